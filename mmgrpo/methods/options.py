"""The slots of a method that hold numbers and names rather than one component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from mmgrpo.core.diffusion import MatchingRule, Suffix, Tree
from mmgrpo.core.masked_diffusion import MaskedRule

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

COMBINE = "sum_then_normalise"
"""How rewards are joined unless the preset says."""
DIVERGENCES = ("exact", "code", "velocity", "mean")
"""Divergences that only a policy with Gaussian decisions can compute."""


@dataclass(frozen=True)
class SamplerOptions:
    """How prompts become a batch.

    Attributes:
        valid_fraction: keep drawing prompts until this share of the batch's groups has spread.
        max_rounds: rounds of drawing at most.
    """

    valid_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_rounds: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class OldPolicy:
    """An average of the weights in place of the last ones: old = d old + (1 - d) weights.

    After the n-th update (from 1) the decay d is ``min(first + slope max(n - delay, 0), limit)``
    (DiffusionNFT, arXiv:2509.16117: slope .001, limit .5). The average is what the predictions of
    ``old_prediction`` come from.

    Attributes:
        first: decay before it grows.
        slope: growth per update.
        limit: largest decay; 0 means that the old policy has the last weights.
        delay: updates before it grows.
        samples: the average draws the samples too, and their log-probabilities are its own.
    """

    first: Share = 0.0
    slope: NonNegative = 0.0
    limit: Share = 0.0
    delay: Annotated[int, Field(ge=0)] = 0
    samples: bool = True

    @property
    def averaged(self) -> bool:
        """Whether there is an average to keep."""
        return self.limit > 0

    def decay(self, updates: int) -> float:
        """Return d after that many updates."""
        return min(self.first + self.slope * max(updates - self.delay, 0), self.limit)


@dataclass(frozen=True)
class RolloutOptions:
    """What the method fixes of a rollout, most of it of denoising models.

    Attributes:
        kernel: step kernel, see :mod:`mmgrpo.core.diffusion`; ``auto`` is that of the model's
            kind: ``flow_sde`` or ``ddim_eta``.
        eta: its noise level (a, eta); null: the published one.
        selection: which steps are stochastic and trained: ``kind`` and its options, see
            :func:`mmgrpo.core.diffusion.select_steps`.
        shared_noise: one initial latent per group.
        tree: which denoising steps a group shares, see :class:`mmgrpo.core.diffusion.Tree`.
        suffix: how the steps after the last stochastic one are solved, see
            :class:`mmgrpo.core.diffusion.Suffix`.
        noise_growth: how much larger the noise gets over the stochastic steps, see
            :meth:`mmgrpo.core.diffusion.StepRule.growing`.
        matching: whether the decisions are (noise, level) draws on the clean samples instead of
            denoising steps, see :class:`mmgrpo.core.diffusion.MatchingRule`.
        old: what the old policy is, see :class:`OldPolicy`.
        drawn_by: whose weights draw the samples: the policy's, or its reference's.
        masked: what the decisions of a masked diffusion language model are, see
            :class:`mmgrpo.core.masked_diffusion.MaskedRule`.
        perturbation: standard deviation of a Gaussian step in weight space for each member of a
            group, which then is the only decision, see
            :class:`mmgrpo.policies.perturbed.PerturbedPolicy`; null: none.
    """

    kernel: str = "flow_sde"
    eta: NonNegative | None = None
    selection: Mapping[str, Any] = field(default_factory=lambda: {"kind": "all_but_last"})
    shared_noise: bool = False
    tree: Tree = field(default_factory=Tree)
    suffix: Suffix = field(default_factory=Suffix)
    noise_growth: NonNegative = 0.0
    matching: MatchingRule = field(default_factory=MatchingRule)
    old: OldPolicy = field(default_factory=OldPolicy)
    drawn_by: Literal["policy", "reference"] = "policy"
    masked: MaskedRule = field(default_factory=MaskedRule)
    perturbation: Positive | None = None


@dataclass(frozen=True)
class RewardOptions:
    """How named rewards become one signal.

    Attributes:
        combine: component that joins several rewards, a name or a mapping with its options.
        shaping: components applied in order to what is normalised: the weighted sum, or each
            reward where rewards are normalised one by one.
        kl: coefficient of the k1 penalty on the reward.
        kl_placement: ``sample`` (whole-sequence penalty before the baseline) or ``decision``
            (each decision's own step reward).
    """

    combine: Any = COMBINE
    shaping: Any = ()
    kl: NonNegative = 0.0
    kl_placement: Literal["sample", "decision"] = "sample"


@dataclass(frozen=True)
class AdvantageOptions:
    """Baseline and scale.

    Attributes:
        baseline: component; what is subtracted from the reward.
        scale: component; what the centred reward is divided by.
        ddof: 1 for the sample, 0 for the population standard deviation.
        eps: added to the scale.
        clip: bound of the absolute advantage.
        valid_group_factor: multiply by min(cap, groups / groups with spread); the value is the cap.
        whiten: whiten over the whole update at the end, each decision or each sample counting once.
        unbiased: Bessel's correction in the whitening.
        history_size: how many of a prompt's last rewards baseline and scale ``history`` look at.
        history_min: with fewer they take the whole update's statistics.
    """

    baseline: str = "group"
    scale: str = "group"
    ddof: Literal[0, 1] = 1
    eps: NonNegative = 1e-6
    clip: Positive | None = None
    valid_group_factor: Annotated[float, Field(ge=1)] | None = None
    whiten: Literal["decisions", "samples"] | None = None
    unbiased: bool = False
    history_size: Annotated[int, Field(ge=1)] = 32
    history_min: Annotated[int, Field(ge=1)] = 16

    @property
    def reads_history(self) -> bool:
        """Whether earlier rewards of the same prompts are needed."""
        return "history" in (self.baseline, self.scale)


@dataclass(frozen=True)
class KlOptions:
    """A KL term of the loss.

    Attributes:
        estimator: k1, k2, k3 (from log-probabilities) or exact, code, velocity, mean (from the
            Gaussian decisions of a flow policy).
        coefficient: beta.
        target: held to the reference, to the old policy, or to the old policy's predictions along
            the group's best sample (Gaussian estimators only; with ``velocity`` the supervised term
            of Dynamic-TreeRPO, arXiv:2509.23352).
        gradient: estimator whose gradient replaces the value's (straight-through).
        floor: where given, the coefficient grows with how good the sample is, from this one at
            an advantage of ``-bound`` to beta at ``bound`` (CRD, arXiv:2603.14128).
        bound: see ``floor``.
    """

    estimator: Literal["k1", "k2", "k3", "exact", "code", "velocity", "mean"] = "k3"
    coefficient: NonNegative = 0.0
    target: Literal["ref", "old", "best"] = "ref"
    gradient: Literal["k1", "k2", "k3"] | None = None
    floor: NonNegative | None = None
    bound: Positive = 5.0

    @property
    def gaussian(self) -> bool:
        """Whether only a policy with Gaussian decisions can compute the estimator."""
        return self.estimator in DIVERGENCES


@dataclass(frozen=True)
class ReferenceOptions:
    """What the reference is, where the method decides it.

    Attributes:
        kind: ``run`` (what ``model.reference`` says) or ``bank`` (one of the policy's own earlier
            states, see :class:`mmgrpo.policies.checkpoint_bank.CheckpointBank`).
        size: states that a bank keeps.
        every: updates between two of them.
    """

    kind: Literal["run", "bank"] = "run"
    size: Annotated[int, Field(ge=1)] = 7
    every: Annotated[int, Field(ge=1)] = 30


@dataclass(frozen=True)
class EntropyControlOptions:
    """Entropies held at targets, see :class:`mmgrpo.core.entropy_control.EntropyControl`.

    Attributes:
        targets: entropy in nats of segment 0, 1, ...; none: no control.
        learning_rate: of the controller.
        limit: largest absolute coefficient of an entropy.
    """

    targets: tuple[NonNegative, ...] = ()
    learning_rate: Positive = 5e-5
    limit: Positive = 5e-3


@dataclass(frozen=True)
class RegulariserOptions:
    """What holds the policy back.

    Attributes:
        kl: see :class:`KlOptions`.
        ref_velocity: coefficient of a second term beside ``kl``: (v - v_ref)^2, the mean over the
            elements, to the reference's velocities (AWM, arXiv:2509.25050).
        drift: coefficient of the drift to the old policy.
        drift_cap: bound of the drift's ratio - 1.
        entropy: coefficient of the entropy bonus.
        entropy_control: see :class:`EntropyControlOptions`.
    """

    kl: KlOptions = field(default_factory=KlOptions)
    ref_velocity: NonNegative = 0.0
    drift: NonNegative = 0.0
    drift_cap: NonNegative = 2.0
    entropy: float = 0.0
    entropy_control: EntropyControlOptions = field(default_factory=EntropyControlOptions)
