"""What a method is: component functions bound to their options, and two verbs that call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor

from mmgrpo.core import aggregation, credit, objectives, ratios, trust_regions
from mmgrpo.core.advantages import GROUP_BASELINES
from mmgrpo.core.aggregation import Denominators
from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.multi_reward import weighted_sum
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MethodError, nearest
from mmgrpo.methods.checks import check_rollout, contradictions
from mmgrpo.methods.components import bind, make_options, spec_of, specs_of, with_default
from mmgrpo.methods.loss import LossOutput, compute_loss
from mmgrpo.methods.options import (
    COMBINE,
    AdvantageOptions,
    ReferenceOptions,
    RegulariserOptions,
    RewardOptions,
    RolloutOptions,
    SamplerOptions,
)
from mmgrpo.methods.prepare import named_rewards, prepare
from mmgrpo.protocols import Evaluation, Request

HEADER = ("id", "title", "paper", "family", "modalities", "confidence", "notes", "requires")
OPTION_SLOTS: dict[str, type] = {
    "sampler": SamplerOptions,
    "rollout": RolloutOptions,
    "reward": RewardOptions,
    "advantage": AdvantageOptions,
    "regulariser": RegulariserOptions,
    "reference": ReferenceOptions,
}
COMPONENT_SLOTS: dict[str, str] = {
    "credit": "uniform",
    "ratio": "token",
    "trust_region": "ppo_clip",
    "objective": "policy_gradient",
    "aggregate": "sequence_mean_token_mean",
    "correction": "none",
    "pairs": "none",
}
"""Slots of one component, with the component that fills them unless the preset names another."""
PREDICTED_BY = {"ref": "ref", "old": "old", "best": "old"}
"""Target of the regulariser -> the weights whose predictions the trainer has to store."""
SLOTS = (*OPTION_SLOTS, *COMPONENT_SLOTS, "filter")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A composed method. Build it with :func:`mmgrpo.load_method`.

    ``components`` are the preset's slots as written; ``reward_weights`` (name -> weight) is set by
    whoever knows the rewards. The other fields are the preset's header, its options and its bound
    components.
    """

    id: str = "custom"
    title: str = ""
    paper: str = ""
    family: str = ""
    modalities: tuple[str, ...] = ("text", "vision", "image")
    confidence: str = ""
    notes: str = ""
    requires: tuple[str, ...] = ()
    sampler: SamplerOptions
    rollout: RolloutOptions
    reward: RewardOptions
    advantage: AdvantageOptions
    regulariser: RegulariserOptions
    reference: ReferenceOptions
    filters: tuple[tuple[str, Callable[..., Tensor]], ...]
    combine: Callable[..., Tensor]
    shaping: tuple[Callable[..., Tensor], ...]
    baseline: Callable[..., Tensor]
    scale: Callable[..., Tensor]
    credit: Callable[..., Tensor]
    ratio: Callable[..., Tensor]
    objective: Callable[..., Any]
    aggregate: Callable[..., Tensor]
    correction: Callable[..., Tensor]
    pairs: Callable[..., Tensor]
    components: Mapping[str, Any]
    reward_weights: Mapping[str, float] = field(default_factory=dict)

    # -- composition ----------------------------------------------------------------------------

    @classmethod
    def compose(cls, preset: Mapping[str, Any]) -> Self:
        """Build a method from a preset mapping.

        Raises:
            MethodError: an unknown name, a wrong type, or choices that contradict each other.
        """
        where = f"method {preset.get('id', cls.id)}"
        for key in preset:
            if key not in (*HEADER, *SLOTS):
                raise MethodError(f"{where}: unknown slot '{key}'{nearest(key, SLOTS)}")
        options: dict[str, Any] = {
            slot: make_options(kind, preset.get(slot), where=f"{where}: {slot}")
            for slot, kind in OPTION_SLOTS.items()
        }
        specs = {
            slot: spec_of(preset.get(slot), default, where=f"{where}: {slot}")
            for slot, default in COMPONENT_SLOTS.items()
        }
        bound: dict[str, Any] = {
            slot: bind(slot, spec, where=where) for slot, spec in specs.items()
        }
        trust_region = bound.pop("trust_region")
        bound["objective"] = with_default(bound["objective"], trust_region=trust_region)
        reward, advantage = options["reward"], options["advantage"]
        shaping = specs_of(reward.shaping, where=f"{where}: reward.shaping")
        combine = spec_of(reward.combine, COMBINE, where=f"{where}: reward.combine")
        filters = specs_of(preset.get("filter"), where=f"{where}: filter")
        header = {key: preset[key] for key in HEADER if key in preset}
        fixed: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in header.items()
        }
        method = cls(
            **fixed,
            **options,
            **bound,
            filters=tuple((spec["name"], bind("filter", spec, where=where)) for spec in filters),
            combine=bind("combine", combine, where=where),
            shaping=tuple(bind("shaping", spec, where=where) for spec in shaping),
            baseline=bind("baseline", {"name": advantage.baseline}, where=where),
            scale=bind("scale", {"name": advantage.scale}, where=where),
            components={slot: preset[slot] for slot in SLOTS if slot in preset},
        )
        for contradiction in contradictions(method):
            raise MethodError(f"{where}: {contradiction}")
        return method

    def component(self, slot: str) -> str:
        """Name of the component in a slot that holds one."""
        return str(spec_of(self.components.get(slot), COMPONENT_SLOTS[slot], where=slot)["name"])

    @property
    def needs(self) -> frozenset[str]:
        """What the trainer has to provide.

        ``ref_log_prob``, ``ref_prediction``, ``old_prediction``, ``baseline_reward``, ``entropy``,
        ``segment``; ``history`` (earlier rewards of the same prompts); ``groups`` (at least two
        samples per prompt, whole groups in ``prepare``),
        ``whole_groups`` (whole groups in ``loss`` too), ``pairs`` (chosen in ``prepare``),
        ``on_policy`` (one update per rollout) and ``one_epoch`` (one pass over a rollout).
        """
        penalty = self.regulariser.kl
        objective = self.component("objective")
        asked = {
            "ref_prediction": bool(self.regulariser.ref_velocity),
            "ref_log_prob": bool(self.reward.kl) or objective in objectives.READS_REFERENCE,
            "old_prediction": self.reads_divergence or objective in objectives.READS_MATCHING,
            "whole_groups": objective in objectives.COUPLES_ROWS,
            "baseline_reward": self.advantage.baseline == "greedy",
            "history": self.advantage.reads_history,
            "groups": self.advantage.baseline in GROUP_BASELINES
            or self.component("credit") in credit.COMPARES_GROUP
            or objective in objectives.READS_PAIRS,
            "pairs": objective in objectives.READS_PAIRS,
            "entropy": self.reads_entropy,
            "segment": self.component("ratio") == "segment"
            or self.component("aggregate") in aggregation.READS_SEGMENTS
            or bool(self.regulariser.entropy_control.targets),
        }
        needs = {*self.requires, *(name for name, needed in asked.items() if needed)}
        if penalty.coefficient and penalty.gaussian:
            needs.add(f"{PREDICTED_BY[penalty.target]}_prediction")
        elif penalty.coefficient and penalty.target == "ref":
            needs.add("ref_log_prob")
        return frozenset(needs)

    @property
    def per_decision(self) -> bool:
        """Whether the loss is a sum over decisions, in which their rows play no part."""
        return (
            self.component("aggregate") in aggregation.SUMS_DECISIONS
            and self.component("ratio") in ratios.PER_DECISION
            and self.component("objective") not in objectives.COUPLES_ROWS
        )

    @property
    def reads_divergence(self) -> bool:
        """Whether ratio or trust region read the exact divergence from the old policy."""
        return (
            self.component("ratio") in ratios.READS_DIVERGENCE
            or self.component("trust_region") in trust_regions.READS_DIVERGENCE
        )

    @property
    def reads_reference(self) -> bool:
        """Whether anything is compared with the reference's weights."""
        return bool(self.needs & {"ref_log_prob", "ref_prediction"})

    @property
    def reads_entropy(self) -> bool:
        """Whether the loss has a term in the entropy."""
        return bool(self.regulariser.entropy or self.regulariser.entropy_control.targets)

    @property
    def request(self) -> Request:
        """What the method reads of a policy's evaluation beside log-probabilities."""
        penalty = self.regulariser.kl
        plain = Request(
            entropy=self.reads_entropy,
            prediction=self.component("objective") in objectives.READS_MATCHING
            or bool(self.regulariser.ref_velocity),
        )
        if self.reads_divergence:
            return replace(plain, divergence="exact", divergence_target="old")
        if penalty.coefficient and penalty.gaussian:
            return replace(plain, divergence=penalty.estimator, divergence_target=penalty.target)
        return plain

    def check_rollout(self, *, num_steps: int, group_size: int) -> None:
        """Refuse a schedule that the method's steps do not fit; raises MethodError."""
        check_rollout(self, num_steps=num_steps, group_size=group_size)

    # -- verbs ----------------------------------------------------------------------------------

    def score(self, trajectories: Trajectories) -> Tensor:
        """``[B]`` weighted sum of the named rewards, before shaping; NaN where none applies."""
        return weighted_sum(named_rewards(trajectories), self.reward_weights)

    def prepare(
        self, trajectories: Trajectories, *, collective: Collective = LOCAL
    ) -> Trajectories:
        """Turn rewards into advantages; see :func:`mmgrpo.methods.prepare.prepare`."""
        return prepare(self, trajectories, collective)

    def loss(
        self,
        log_prob: Tensor,
        trajectories: Trajectories,
        *,
        evaluation: Evaluation | None = None,
        total: Denominators | None = None,
    ) -> LossOutput:
        """Turn log-probabilities into a loss; see :func:`mmgrpo.methods.loss.compute_loss`."""
        return compute_loss(self, log_prob, trajectories, evaluation=evaluation, total=total)
