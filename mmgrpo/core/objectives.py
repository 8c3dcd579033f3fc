"""Surrogates: per-decision losses ``[B, T]`` (minimised), unreduced until aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.core.trust_regions import Region

TrustRegion = Callable[[Tensor, Tensor, Tensor | None], Region]


class Decisions(NamedTuple):
    """What an objective sees of the decisions, each ``[B, T]`` and finite where the mask is off.

    ``log_ratio`` is at the method's level (token, segment, sequence), the log-probabilities are
    the decisions' own; only ``log_ratio``, ``log_prob`` and ``matching.prediction`` carry
    gradients. ``divergence`` from the old policy is there where the trust region reads it. The
    other fields are there where the objective's name is in the table that asks for them.

    Attributes:
        ref_log_prob: ``[B, T]`` under the reference (:data:`READS_REFERENCE`).
        matching: see :class:`Matching` (:data:`READS_MATCHING`).
        mask: ``[B, T]`` bool.
        group: ``[B]`` int64 (:data:`COUPLES_ROWS`: whole groups are in one call).
        pairs: ``[N, 2]`` int64 rows (preferred, rejected).
        tokens: ``[B]``, see :class:`~mmgrpo.core.trajectories.Trajectories`.
    """

    log_ratio: Tensor
    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    divergence: Tensor | None = None
    ref_log_prob: Tensor | None = None
    matching: Matching | None = None
    mask: Tensor | None = None
    group: Tensor | None = None
    pairs: Tensor | None = None
    tokens: Tensor | None = None


class Matching(NamedTuple):
    """A denoiser's predictions on noised clean samples; a decision is one (noise, level) draw.

    Attributes:
        prediction: ``[B, T, ...]`` velocity under the policy being trained, differentiable.
        old_prediction: ``[B, T, ...]`` under the policy that sampled.
        target: ``[B, T, ...]`` velocity that leads to the clean sample (noise - clean).
        sigma: ``[B, T]`` noise levels.
    """

    prediction: Tensor
    old_prediction: Tensor
    target: Tensor
    sigma: Tensor


PAIRS_DECISIONS = frozenset({"step_preference", "semi_preference"})
"""Objectives that compare decision t of a row with decision t of its partner."""
READS_PAIRS = PAIRS_DECISIONS | {"preference"}
"""Objectives that compare the rows of ``pairs``."""
READS_REFERENCE: frozenset[str] = frozenset(READS_PAIRS | {"group_preference"})
"""Objectives that read the reference's log-probabilities."""
READS_MATCHING: frozenset[str] = frozenset({"negative_aware", "centred_reward"})
"""Objectives that read the predictions of noised clean samples."""
COUPLES_ROWS: frozenset[str] = READS_PAIRS | {"group_preference", "centred_reward"}
"""Objectives whose loss of a row depends on the other rows of its group or on its pair."""


class Surrogate(NamedTuple):
    """Loss ``[B, T]`` and ``kept [B, T]`` bool, False where a bound cut the gradient.

    ``metrics``: name -> ``[B, T]``, whose mean over the trained decisions is worth a look.
    """

    loss: Tensor
    kept: Tensor
    metrics: Mapping[str, Tensor] = MappingProxyType({})


def policy_gradient(decisions: Decisions, *, trust_region: TrustRegion) -> Surrogate:
    """Importance-weighted policy gradient under a trust region: -ratio_eff * A (PPO, GRPO, ...)."""
    region = trust_region(decisions.log_ratio.exp(), decisions.advantage, decisions.divergence)
    return Surrogate(-region.ratio * decisions.advantage, region.kept)


def reinforce(decisions: Decisions) -> Surrogate:
    """Plain policy gradient without a ratio: -A log_prob (REINFORCE; GPG, arXiv:2504.02546)."""
    loss = -decisions.advantage * decisions.log_prob
    return Surrogate(loss, torch.ones_like(loss, dtype=torch.bool))


def log_policy_gradient(decisions: Decisions, *, low: float = 0.2, high: float = 0.2) -> Surrogate:
    """Policy gradient on the log-probability, clipped in log space (CPGD, arXiv:2505.12504).

    For A > 0 log_prob is bounded above by old + log(1 + high), for A <= 0 below by
    old + log(1 - low). The gradient is |A| inside the region, without a ratio factor.
    """
    log_ratio, log_prob, old_log_prob, advantage = decisions[:4]
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"clip widths must be 0 <= low < 1 and high >= 0; got {low}, {high}")
    upper, lower = math.log1p(high), math.log1p(-low)
    positive = advantage > 0
    kept = torch.where(positive, log_ratio <= upper, log_ratio >= lower)
    bound = torch.where(positive, log_ratio.new_tensor(upper), log_ratio.new_tensor(lower))
    effective = torch.where(kept, log_prob, (old_log_prob + bound).detach())
    return Surrogate(-advantage * effective, kept)


def weighted_policy_gradient(
    decisions: Decisions, *, max_weight: float = 5.0, min_weight: float = 0.0
) -> Surrogate:
    """Policy gradient times a detached, clipped importance weight (CISPO, arXiv:2506.13585).

    No decision loses its gradient; ``kept`` tells where the weight was not clipped.

    Args:
        decisions: see :class:`Decisions`.
        max_weight: absolute upper bound of the weight (not 1 + epsilon).
        min_weight: absolute lower bound.
    """
    if not 0 <= min_weight <= max_weight:
        raise ValueError(f"expected 0 <= min_weight <= max_weight; got {min_weight}, {max_weight}")
    ratio = decisions.log_ratio.detach().exp()
    kept = (ratio >= min_weight) & (ratio <= max_weight)
    weight = ratio.clamp(min_weight, max_weight)
    return Surrogate(-weight * decisions.advantage * decisions.log_prob, kept)
