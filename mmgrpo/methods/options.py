"""The slots of a method that hold numbers and names rather than one component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from mmgrpo.core.diffusion import Suffix, Tree

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

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
class RolloutOptions:
    """What the method fixes of a flow rollout.

    Attributes:
        kernel: step kernel, see :mod:`mmgrpo.core.diffusion`.
        eta: its noise level (a, eta).
        selection: which steps are stochastic and trained: ``kind`` and its options, see
            :func:`mmgrpo.core.diffusion.select_steps`.
        shared_noise: one initial latent per group.
        tree: which denoising steps a group shares, see :class:`mmgrpo.core.diffusion.Tree`.
        suffix: how the steps after the last stochastic one are solved, see
            :class:`mmgrpo.core.diffusion.Suffix`.
    """

    kernel: str = "flow_sde"
    eta: NonNegative = 0.7
    selection: Mapping[str, Any] = field(default_factory=lambda: {"kind": "all_but_last"})
    shared_noise: bool = False
    tree: Tree = field(default_factory=Tree)
    suffix: Suffix = field(default_factory=Suffix)


@dataclass(frozen=True)
class RewardOptions:
    """How named rewards become one signal.

    Attributes:
        combine: component that joins several rewards.
        shaping: components applied in order to what is normalised: the weighted sum, or each
            reward where rewards are normalised one by one.
        kl: coefficient of the k1 penalty on the reward.
        kl_placement: ``sample`` (whole-sequence penalty before the baseline) or ``decision``
            (each decision's own step reward).
    """

    combine: str = "sum_then_normalise"
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
    """

    baseline: str = "group"
    scale: str = "group"
    ddof: Literal[0, 1] = 1
    eps: NonNegative = 1e-6
    clip: Positive | None = None
    valid_group_factor: Annotated[float, Field(ge=1)] | None = None
    whiten: Literal["decisions", "samples"] | None = None
    unbiased: bool = False


@dataclass(frozen=True)
class KlOptions:
    """A KL term of the loss.

    Attributes:
        estimator: k1, k2, k3 (from log-probabilities) or exact, code, velocity, mean (from the
            Gaussian decisions of a flow policy).
        coefficient: beta.
        target: held to the reference or to the old policy.
        gradient: estimator whose gradient replaces the value's (straight-through).
    """

    estimator: Literal["k1", "k2", "k3", "exact", "code", "velocity", "mean"] = "k3"
    coefficient: NonNegative = 0.0
    target: Literal["ref", "old"] = "ref"
    gradient: Literal["k1", "k2", "k3"] | None = None

    @property
    def gaussian(self) -> bool:
        """Whether only a policy with Gaussian decisions can compute the estimator."""
        return self.estimator in DIVERGENCES


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
    drift: NonNegative = 0.0
    drift_cap: NonNegative = 2.0
    entropy: float = 0.0
