"""Importance ratios at the level a method wants, through one mechanism: segment ids.

Input and output are *log*-ratios ``[B, T]``; a decision's entry is the log-ratio of the segment it
belongs to. Token level has one segment per decision, sequence level one per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

READS_DIVERGENCE = frozenset({"guard"})
"""Ratios that read the divergence from the old policy and the std of each decision."""
PER_DECISION = frozenset({"token", "guard"})
"""Ratios of single decisions, which do not see the others of their row."""
LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 so that exp() stays finite in float32."""


def log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """Return log pi_theta - log pi_old, ``[B, T]``, clamped; 0 where the mask is off."""
    difference = log_prob - old_log_prob
    return _clamp(torch.where(mask, difference, torch.zeros_like(difference)))


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def segment_reduce(x: Tensor, mask: Tensor, segment: Tensor, *, mean: bool) -> Tensor:
    """Sum or mean of ``x [B, T]`` over each row's segments, spread back to ``[B, T]``.

    Args:
        x: ``[B, T]``, finite where the mask is off.
        mask: ``[B, T]`` bool, what is counted.
        segment: ``[B, T]`` non-negative span ids, local to the row.
        mean: mean instead of sum.
    """
    width = int(segment.max()) + 1 if segment.numel() else 1
    weight = mask.to(x.dtype)
    total = x.new_zeros(x.shape[0], width).scatter_add(1, segment, x * weight)
    if mean:
        count = weight.new_zeros(x.shape[0], width).scatter_add(1, segment, weight)
        total = total / count.clamp_min(1.0)
    return total.gather(1, segment) * weight


def token(log_ratio: Tensor, mask: Tensor, segment: Tensor | None = None) -> Tensor:
    """One ratio per decision."""
    return log_ratio * mask


def segment(
    log_ratio: Tensor, mask: Tensor, segment: Tensor | None = None, *, product: bool = False
) -> Tensor:
    """One ratio per span of ``trajectories.segment``: geometric mean, or the product."""
    if segment is None:
        raise ValueError("segment-level ratios need trajectories.segment")
    return _clamp(segment_reduce(log_ratio, mask, segment, mean=not product))


def sequence(
    log_ratio: Tensor,
    mask: Tensor,
    segment: Tensor | None = None,
    *,
    product: bool = False,
    straight_through: bool = False,
) -> Tensor:
    """One ratio per sample: exp of the mean log-ratio (GSPO, arXiv:2507.18071) or the product.

    Args:
        log_ratio: ``[B, T]`` of the single decisions.
        mask: ``[B, T]`` bool.
        segment: not read: the whole sample is one segment.
        product: true density ratio instead of its length-normalised (geometric) form.
        straight_through: GSPO-token: the sequence's value with each decision's own gradient.
    """
    whole = torch.zeros_like(log_ratio, dtype=torch.int64)
    value = _clamp(segment_reduce(log_ratio, mask, whole, mean=not product))
    if straight_through:
        value = value.detach() + (log_ratio - log_ratio.detach()) * mask
    return value


def guard(
    log_ratio: Tensor,
    mask: Tensor,
    segment: Tensor | None = None,
    *,
    divergence: Tensor,
    step_std: Tensor,
) -> Tensor:
    """Centre and equalise the log-ratio of each denoising step (GRPO-Guard, arXiv:2510.22319).

    s (log r + D) with D = mean (mu - mu_old)^2 / (2 s^2), which is mean z (mu - mu_old): mean zero
    under the old policy, and free of the factor 1/s that makes late steps weigh more.

    Args:
        log_ratio: ``[B, T]`` of the single decisions.
        mask: ``[B, T]`` bool.
        segment: not read.
        divergence: ``[B, T]`` D, the exact divergence from the old policy; carries gradients.
        step_std: ``[B, T]`` s.
    """
    return _clamp(step_std * (log_ratio + divergence)) * mask
