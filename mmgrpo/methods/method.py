"""A method: component functions bound to their options, and the two verbs that call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from mmgrpo.core import divergence as kl
from mmgrpo.core.advantages import whiten
from mmgrpo.core.aggregation import Denominators, denominators
from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.credit import node_mean, node_weight
from mmgrpo.core.groups import group_index, uniform_groups
from mmgrpo.core.multi_reward import weighted_sum
from mmgrpo.core.ratios import log_ratio
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MethodError, nearest
from mmgrpo.methods.components import bind, check_options
from mmgrpo.protocols import Evaluation, Request

DIVERGENCES = ("exact", "code", "velocity", "mean")
"""Divergences that only a policy with Gaussian decisions can compute."""


@dataclass(frozen=True)
class SamplerOptions:
    """How prompts become a batch.

    Attributes:
        valid_fraction: keep drawing prompts until this share of the batch's groups has spread.
        max_rounds: rounds of drawing at most.
    """

    valid_fraction: float = 0.0
    max_rounds: int = 1


@dataclass(frozen=True)
class RewardOptions:
    """How named rewards become one signal.

    Attributes:
        combine: sum_then_normalise, normalise_then_sum or gdpo.
        shaping: components applied in order.
        kl: coefficient of the k1 penalty on the reward.
        kl_placement: ``sample`` (whole-sequence penalty before the baseline) or ``decision``
            (each decision's own step reward).
    """

    combine: str = "sum_then_normalise"
    shaping: tuple[Any, ...] = ()
    kl: float = 0.0
    kl_placement: str = "sample"


@dataclass(frozen=True)
class AdvantageOptions:
    """Baseline and scale.

    Attributes:
        baseline, scale: components.
        ddof: 1 for the sample, 0 for the population standard deviation.
        eps: added to the scale.
        clip: bound of the absolute advantage.
        valid_group_factor: multiply by min(cap, groups / groups with spread); the value is the cap.
        whiten: ``decisions`` or ``samples``: whiten over the whole update at the end.
        unbiased: Bessel's correction in the whitening.
    """

    baseline: str = "group"
    scale: str = "group"
    ddof: int = 1
    eps: float = 1e-6
    clip: float | None = None
    valid_group_factor: float | None = None
    whiten: str | None = None
    unbiased: bool = False


@dataclass(frozen=True)
class KlOptions:
    """A KL term of the loss.

    Attributes:
        estimator: k1, k2, k3 (from log-probabilities) or exact, code, velocity, mean (from the
            Gaussian decisions of a flow policy).
        coefficient: beta.
        target: ``ref`` or ``old``.
        gradient: estimator whose gradient replaces the value's (straight-through).
    """

    estimator: str = "k3"
    coefficient: float = 0.0
    target: str = "ref"
    gradient: str | None = None


@dataclass(frozen=True)
class RegulariserOptions:
    """What holds the policy back.

    Attributes:
        kl: see :class:`KlOptions`.
        drift: coefficient of the drift to the old policy.
        drift_cap: bound of the drift's ratio - 1.
        entropy: coefficient of the entropy bonus.
    """

    kl: KlOptions = field(default_factory=KlOptions)
    drift: float = 0.0
    drift_cap: float = 2.0
    entropy: float = 0.0


@dataclass(frozen=True)
class RolloutOptions:
    """What the method fixes of a flow rollout.

    Attributes:
        kernel: step kernel, see :mod:`mmgrpo.core.diffusion`.
        eta: its noise level (a, eta).
        selection: which steps are stochastic and trained, with options.
        shared_noise: one initial latent per group.
        density: full Gaussian log-density for kernels whose public code leaves the variance out.
    """

    kernel: str = "flow_sde"
    eta: float = 0.7
    selection: Mapping[str, Any] = field(default_factory=lambda: {"name": "all_but_last"})
    shared_noise: bool = False
    density: bool | None = None


_OPTION_SLOTS: dict[str, type] = {
    "sampler": SamplerOptions,
    "rollout": RolloutOptions,
    "reward": RewardOptions,
    "advantage": AdvantageOptions,
    "regulariser": RegulariserOptions,
}
_COMPONENT_SLOTS: dict[str, str] = {
    "credit": "uniform",
    "ratio": "token",
    "trust_region": "ppo_clip",
    "objective": "policy_gradient",
    "aggregate": "sequence_mean_token_mean",
    "correction": "none",
}
SLOTS = (*_OPTION_SLOTS, *_COMPONENT_SLOTS, "filter")


@dataclass(frozen=True)
class LossOutput:
    """A (micro-batch's share of the) loss.

    Attributes:
        loss: scalar to differentiate; the shares of all micro-batches and ranks sum to the loss.
        metrics: shares that sum to the update's mean, keyed as in ``metrics.jsonl``.
        max_log_ratio: largest absolute log-ratio, for the on-policy check.
    """

    loss: Tensor
    metrics: dict[str, float]
    max_log_ratio: float


@dataclass(frozen=True)
class Method:
    """A composed method. Build it with :func:`mmgrpo.load_method`."""

    id: str
    title: str
    paper: str
    family: str
    modalities: tuple[str, ...]
    confidence: str
    notes: str
    requires: tuple[str, ...]
    sampler: SamplerOptions
    rollout: RolloutOptions
    reward: RewardOptions
    advantage: AdvantageOptions
    regulariser: RegulariserOptions
    filters: tuple[tuple[str, Callable[..., Tensor]], ...]
    combine: Callable[..., Tensor]
    shaping: tuple[Callable[..., Tensor], ...]
    baseline: Callable[..., Tensor]
    scale: Callable[..., Tensor]
    credit: Callable[..., Tensor]
    ratio: Callable[..., Tensor]
    trust_region: Callable[..., Any]
    objective: Callable[..., Any]
    aggregate: Callable[..., Tensor]
    correction: Callable[..., Tensor]
    components: Mapping[str, Any]
    reward_weights: Mapping[str, float] = field(default_factory=dict)

    # -- composition ----------------------------------------------------------------------------

    @classmethod
    def compose(cls, preset: Mapping[str, Any]) -> Self:
        """Build a method from a preset mapping; unknown names raise :class:`MethodError`."""
        where = f"method {preset.get('id', '?')}"
        options = {
            slot: _options(kind, preset.get(slot) or {}, f"{where}: {slot}")
            for slot, kind in _OPTION_SLOTS.items()
        }
        components = {
            slot: bind(slot, _spec(preset.get(slot), default), where=where)
            for slot, default in _COMPONENT_SLOTS.items()
        }
        reward, advantage = options["reward"], options["advantage"]
        method = cls(
            id=str(preset.get("id", "custom")),
            title=str(preset.get("title", "")),
            paper=str(preset.get("paper", "")),
            family=str(preset.get("family", "")),
            modalities=tuple(preset.get("modalities", ("text", "vision", "image"))),
            confidence=str(preset.get("confidence", "")),
            notes=str(preset.get("notes", "")).strip(),
            requires=tuple(preset.get("requires", ())),
            **options,
            **components,
            filters=tuple(
                (_spec(spec, "")["name"], bind("filter", _spec(spec, ""), where=where))
                for spec in preset.get("filter") or ()
            ),
            combine=bind("combine", {"name": reward.combine}, where=where),
            shaping=tuple(
                bind("shaping", _spec(spec, ""), where=where) for spec in reward.shaping
            ),
            baseline=bind("baseline", {"name": advantage.baseline}, where=where),
            scale=bind("scale", {"name": advantage.scale}, where=where),
            components={slot: preset[slot] for slot in SLOTS if slot in preset},
        )
        method._check(where)
        return method

    def _check(self, where: str) -> None:
        estimator = self.regulariser.kl.estimator
        known = ("k1", "k2", "k3", *DIVERGENCES)
        for name, value, choices in (
            ("regulariser.kl.estimator", estimator, known),
            ("regulariser.kl.target", self.regulariser.kl.target, ("ref", "old")),
            ("reward.kl_placement", self.reward.kl_placement, ("sample", "decision")),
            ("advantage.whiten", self.advantage.whiten or "samples", ("samples", "decisions")),
        ):
            if value not in choices:
                raise MethodError(f"{where}: {name} '{value}'{nearest(str(value), choices)}")
        if self.reward.kl_placement == "decision" and self.reward.kl and self._credit_name != "reward_to_go":
            raise MethodError(
                f"{where}: reward.kl_placement 'decision' needs credit 'reward_to_go'; "
                f"'{self._credit_name}' would drop the step rewards."
            )

    @property
    def _credit_name(self) -> str:
        return str(_spec(self.components.get("credit"), "uniform")["name"])

    @property
    def needs(self) -> frozenset[str]:
        """What the trainer has to provide.

        ``ref_log_prob``, ``ref_prediction``, ``old_prediction``, ``baseline_reward``, ``entropy``,
        ``segment``; ``groups`` (at least two samples per prompt, whole groups per minibatch) and
        ``on_policy`` (one update per rollout).
        """
        needs = set(self.requires)
        penalty = self.regulariser.kl
        if penalty.coefficient:
            gaussian = penalty.estimator in DIVERGENCES
            if gaussian or penalty.target == "ref":
                needs.add(f"{penalty.target}_{'prediction' if gaussian else 'log_prob'}")
        if self.reward.kl:
            needs.add("ref_log_prob")
        if self.advantage.baseline == "greedy":
            needs.add("baseline_reward")
        if self.advantage.baseline in ("group", "leave_one_out", "length_weighted"):
            needs.add("groups")
        if self.regulariser.entropy:
            needs.add("entropy")
        if _spec(self.components.get("ratio"), "token")["name"] == "segment":
            needs.add("segment")
        return frozenset(needs)

    @property
    def request(self) -> Request:
        """What the method reads of a policy's evaluation beside log-probabilities."""
        penalty = self.regulariser.kl
        gaussian = penalty.coefficient and penalty.estimator in DIVERGENCES
        return Request(
            entropy=bool(self.regulariser.entropy),
            divergence=penalty.estimator if gaussian else None,
            divergence_target=penalty.target,
        )

    # -- before the update ----------------------------------------------------------------------

    def score(self, trajectories: Trajectories) -> Tensor:
        """``[B]`` weighted sum of the named rewards, before shaping."""
        if trajectories.rewards:
            return weighted_sum(trajectories.rewards, self.reward_weights)
        if trajectories.reward is None:
            raise ValueError("trajectories carry neither rewards nor reward")
        return trajectories.reward

    def prepare(
        self, trajectories: Trajectories, *, collective: Collective = LOCAL
    ) -> Trajectories:
        """Fill ``reward`` and ``advantage``, and leave out what the filters drop.

        Args:
            trajectories: a whole update: every group complete.
            collective: statistics over ranks.
        """
        score = self.score(trajectories)
        trajectories, score = self._filter(trajectories, score, before=True)
        trajectories = self._penalise(trajectories)
        rewards = trajectories.rewards or {"reward": score}
        shaped = {name: self._shape(value, trajectories) for name, value in rewards.items()}
        weights = self.reward_weights if trajectories.rewards else {}

        def normalise(reward: Tensor) -> Tensor:
            return self._sample_advantage(reward, trajectories, collective)

        advantage = self.combine(shaped, weights, normalise, collective=collective)
        advantage = self._spread(advantage.nan_to_num(0.0), trajectories, collective)
        trajectories = trajectories.replace(
            reward=weighted_sum(shaped, weights), advantage=advantage
        )
        if trajectories.node is not None:
            trajectories = trajectories.replace(
                advantage=node_mean(advantage, trajectories.node, trajectories.mask),
                weight=node_weight(trajectories.node, trajectories.mask),
            )
        return self._filter(trajectories, score, before=False)[0]

    def _filter(
        self, trajectories: Trajectories, score: Tensor, *, before: bool
    ) -> tuple[Trajectories, Tensor]:
        for name, keep in self.filters:
            if before == (name != "zero_advantage"):
                rows = keep(trajectories, score)
                if not bool(rows.all()) and bool(rows.any()):
                    trajectories, score = trajectories.select(rows), score[rows]
                elif not bool(rows.any()):
                    empty = torch.zeros_like(trajectories.mask)
                    trajectories = trajectories.replace(mask=empty)
        return trajectories, score

    def _penalise(self, trajectories: Trajectories) -> Trajectories:
        if not self.reward.kl or self.reward.kl_placement != "decision":
            return trajectories
        penalty = -self.reward.kl * self._k1(trajectories)
        old = trajectories.step_reward
        return trajectories.replace(step_reward=penalty if old is None else old + penalty)

    def _k1(self, trajectories: Trajectories) -> Tensor:
        old, ref = trajectories.old_log_prob, trajectories.ref_log_prob
        if old is None or ref is None:
            raise ValueError(f"{self.id} needs old_log_prob and ref_log_prob")
        return kl.k1(old, ref) * trajectories.mask

    def _shape(self, reward: Tensor, trajectories: Trajectories) -> Tensor:
        for shape in self.shaping:
            reward = shape(reward, trajectories)
        if self.reward.kl and self.reward.kl_placement == "sample":
            reward = reward - self.reward.kl * self._k1(trajectories).sum(dim=1)
        return reward

    def _sample_advantage(
        self, reward: Tensor, trajectories: Trajectories, collective: Collective
    ) -> Tensor:
        """``[B]``: (reward - baseline) / (scale + eps), in float64 inside."""
        options = self.advantage
        exact = reward.double()
        centred = exact - self.baseline(exact, trajectories).double()
        scale = self.scale(
            exact, centred, trajectories, ddof=options.ddof, collective=collective
        )
        if options.scale != "none":
            centred = centred / (scale + options.eps)
        uniform = uniform_groups(exact, trajectories.group)
        if options.baseline in ("group", "leave_one_out") and bool(uniform.any()):
            several = torch.bincount(group_index(trajectories.group)[0])[
                group_index(trajectories.group)[0]
            ]
            centred = torch.where(uniform & (several > 1), torch.zeros_like(centred), centred)
        if options.valid_group_factor is not None:
            centred = centred * self._valid_group_factor(uniform, trajectories, collective)
        if options.clip is not None:
            centred = centred.clamp(-options.clip, options.clip)
        return centred.to(reward.dtype)

    def _valid_group_factor(
        self, uniform: Tensor, trajectories: Trajectories, collective: Collective
    ) -> Tensor:
        """min(cap, groups / groups with spread): undoes the dilution by uniform groups."""
        index, count = group_index(trajectories.group)
        flat = torch.zeros(count, dtype=torch.double, device=index.device)
        flat[index] = uniform.double()
        totals = collective.sum(torch.stack([flat.new_tensor(float(count)), flat.sum()]))
        factor = totals[0] / (totals[0] - totals[1]).clamp_min(1.0)
        return factor.clamp_max(float(self.advantage.valid_group_factor or 1.0))

    def _spread(
        self, advantage: Tensor, trajectories: Trajectories, collective: Collective
    ) -> Tensor:
        options = self.advantage
        if options.whiten == "samples":
            valid = trajectories.mask.any(dim=1).to(advantage.dtype)
            advantage = whiten(
                advantage, valid, unbiased=options.unbiased, collective=collective
            )
        spread: Tensor = self.credit(advantage, trajectories)
        if options.whiten == "decisions":
            weight = trajectories.mask.to(spread.dtype)
            spread = whiten(spread, weight, unbiased=options.unbiased, collective=collective)
        return spread

    # -- the update -----------------------------------------------------------------------------

    def loss(
        self,
        log_prob: Tensor,
        trajectories: Trajectories,
        *,
        evaluation: Evaluation | None = None,
        total: Denominators | None = None,
    ) -> LossOutput:
        """The loss of prepared trajectories.

        Args:
            log_prob: ``[B, T]`` under the policy being trained, differentiable.
            trajectories: prepared; may be a micro-batch of the update.
            evaluation: the policy's evaluation, where the method reads more than ``log_prob``.
            total: denominators of the whole update; those of ``trajectories`` when None.
        """
        advantage, old, mask = trajectories.advantage, trajectories.old_log_prob, trajectories.mask
        if advantage is None:
            raise ValueError("trajectories carry no advantage: call method.prepare first")
        old = log_prob.detach() if old is None else old
        total = denominators(trajectories) if total is None else total
        weight = trajectories.decision_weight.to(log_prob.dtype)
        per_decision = log_ratio(log_prob, old, mask)
        levelled = self.ratio(per_decision, mask, trajectories.segment)
        surrogate = self.objective(
            levelled, log_prob, old, advantage, trust_region=self.trust_region
        )
        loss = surrogate.loss
        if trajectories.rollout_log_prob is not None:
            mismatch = log_ratio(old, trajectories.rollout_log_prob, mask)
            loss = loss * self.correction(mismatch, mask)
        penalty, metrics = self._regularise(log_prob, per_decision, trajectories, evaluation)
        loss = torch.where(mask, loss + penalty, torch.zeros_like(loss))
        value = self.aggregate(loss, weight, total)
        share = weight.detach() / total.decisions
        metrics["clip_fraction"] = (~surrogate.kept).to(share.dtype)
        metrics["ratio/mean"] = levelled.exp()
        metrics["policy/approximate_kl"] = kl.k3(old, log_prob)
        return LossOutput(
            loss=value,
            metrics={
                "loss": float(value.detach()),
                **{name: float((x.detach() * share).sum()) for name, x in metrics.items()},
            },
            max_log_ratio=float(per_decision.detach().abs().max()) if len(mask) else 0.0,
        )

    def _regularise(
        self,
        log_prob: Tensor,
        log_ratio: Tensor,
        trajectories: Trajectories,
        evaluation: Evaluation | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-decision penalty ``[B, T]`` and the quantities to log."""
        options = self.regulariser
        penalty = torch.zeros_like(log_prob)
        metrics: dict[str, Tensor] = {}
        if options.kl.coefficient:
            divergence = self._kl(log_prob, trajectories, evaluation)
            metrics["kl"] = divergence
            penalty = penalty + options.kl.coefficient * divergence
        if options.drift:
            penalty = penalty + options.drift * kl.drift(log_prob, log_ratio, cap=options.drift_cap)
        entropy = evaluation.entropy if evaluation is not None else None
        if options.entropy:
            if entropy is None:
                raise ValueError(f"{self.id} needs the evaluation's entropy")
            penalty = penalty - options.entropy * entropy
        if entropy is not None:
            metrics["entropy"] = entropy
        return penalty, metrics

    def _kl(
        self, log_prob: Tensor, trajectories: Trajectories, evaluation: Evaluation | None
    ) -> Tensor:
        options = self.regulariser.kl
        if options.estimator in DIVERGENCES:
            if evaluation is None or evaluation.divergence is None:
                raise ValueError(f"{self.id} needs the evaluation's '{options.estimator}' divergence")
            return evaluation.divergence
        other = trajectories.ref_log_prob if options.target == "ref" else trajectories.old_log_prob
        if other is None:
            raise ValueError(f"{self.id} needs {options.target}_log_prob")
        value = bind("estimator", {"name": options.estimator}, where=self.id)(log_prob, other)
        if options.gradient is None:
            return torch.where(trajectories.mask, value, torch.zeros_like(value))
        gradient = bind("estimator", {"name": options.gradient}, where=self.id)(log_prob, other)
        mixed = kl.straight_through(value, gradient)
        return torch.where(trajectories.mask, mixed, torch.zeros_like(mixed))


def _spec(value: Any, default: str) -> dict[str, Any]:
    """A component spec as a mapping: None, a bare name, or ``{name: ..., **options}``."""
    if value is None:
        return {"name": default}
    if isinstance(value, str):
        return {"name": value}
    return {"name": default, **value} if default else dict(value)


def _options(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Build an options dataclass from a mapping, refusing unknown keys and wrong types."""
    known = {f.name: f for f in fields(kind)}
    check_options(values, set(known), where=where)
    changes = dict(values)
    if kind is RegulariserOptions and "kl" in changes:
        changes["kl"] = _options(KlOptions, changes["kl"], f"{where}.kl")
    if "shaping" in changes:
        changes["shaping"] = tuple(changes["shaping"])
    for key, value in changes.items():
        default = getattr(kind(), key)
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise MethodError(f"{where}.{key}: expected a number, got {value!r}.")
    return kind(**changes)
