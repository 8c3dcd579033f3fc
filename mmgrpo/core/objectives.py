"""Surrogates: per-decision losses ``[B, T]`` (minimised), unreduced until aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.core.trust_regions import Region

TrustRegion = Callable[[Tensor, Tensor], Region]


class Surrogate(NamedTuple):
    """Loss ``[B, T]`` and ``kept [B, T]`` bool, False where a bound cut the gradient."""

    loss: Tensor
    kept: Tensor


def policy_gradient(
    log_ratio: Tensor,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    trust_region: TrustRegion,
) -> Surrogate:
    """Importance-weighted policy gradient under a trust region: -ratio_eff * A (PPO, GRPO, ...)."""
    region = trust_region(log_ratio.exp(), advantage)
    return Surrogate(-region.ratio * advantage, region.kept)


def reinforce(
    log_ratio: Tensor,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    trust_region: TrustRegion,
) -> Surrogate:
    """Plain policy gradient without a ratio: -A log_prob (REINFORCE; GPG, arXiv:2504.02546)."""
    return Surrogate(-advantage * log_prob, torch.ones_like(log_prob, dtype=torch.bool))


def log_policy_gradient(
    log_ratio: Tensor,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    trust_region: TrustRegion,
    low: float = 0.2,
    high: float = 0.2,
) -> Surrogate:
    """Policy gradient on the log-probability, clipped in log space (CPGD, arXiv:2505.12504).

    For A > 0 log_prob is bounded above by old + log(1 + high), for A <= 0 below by
    old + log(1 - low). The gradient is |A| inside the region, without a ratio factor.
    """
    upper, lower = math.log1p(high), math.log1p(-low)
    kept = torch.where(advantage > 0, log_ratio <= upper, log_ratio >= lower)
    bound = torch.where(advantage > 0, log_ratio.new_tensor(upper), log_ratio.new_tensor(lower))
    effective = torch.where(kept, log_prob, (old_log_prob + bound).detach())
    return Surrogate(-advantage * effective, kept)


def weighted_policy_gradient(
    log_ratio: Tensor,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    trust_region: TrustRegion,
    max_weight: float = 5.0,
    min_weight: float = 0.0,
) -> Surrogate:
    """Policy gradient times a detached, clipped importance weight (CISPO, arXiv:2506.13585).

    Args:
        max_weight, min_weight: absolute bounds of the weight (not 1 + epsilon).
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(min_weight, max_weight)
    kept = (ratio >= min_weight) & (ratio <= max_weight)
    return Surrogate(-weight * advantage * log_prob, kept)
