"""Weights for the mismatch between the engine that sampled and the policy that trains.

With l = old_log_prob - rollout_log_prob, each function maps l ``[B, T]`` (0 where the mask is off)
to a detached weight ``[B, T]``. Without a separate engine l is 0 and every weight is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.ratios import sequence as whole_sequence


def none(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """1."""
    return torch.ones_like(log_ratio)


def truncated(
    log_ratio: Tensor, mask: Tensor, *, cap: float = 2.0, floor: float = 0.0, sequence: bool = False
) -> Tensor:
    """min(exp(l), cap): truncated importance weights (TIS).

    Args:
        log_ratio: l, ``[B, T]``.
        mask: ``[B, T]`` bool.
        cap: largest weight.
        floor: smallest weight.
        sequence: use the product over the sample instead of each decision's own weight.
    """
    return _weight(log_ratio, mask, sequence).clamp(floor, cap)


def masked(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    low: float = 0.5,
    high: float = 2.0,
    sequence: bool = False,
) -> Tensor:
    """exp(l) inside [low, high], 0 outside: masked importance weights (MIS, IcePop).

    Args:
        log_ratio: l, ``[B, T]``.
        mask: ``[B, T]`` bool.
        low: smallest weight that is kept.
        high: largest weight that is kept.
        sequence: use the product over the sample instead of each decision's own weight.
    """
    weight = _weight(log_ratio, mask, sequence)
    return torch.where((weight >= low) & (weight <= high), weight, torch.zeros_like(weight))


def geometric_rejection(
    log_ratio: Tensor, mask: Tensor, *, low: float = 0.999, high: float = 1.001
) -> Tensor:
    """1 for samples whose geometric mean weight exp(mean l) lies in [low, high], else 0."""
    weight = whole_sequence(log_ratio.detach(), mask).exp()
    return ((weight >= low) & (weight <= high)).to(log_ratio.dtype)


def _weight(log_ratio: Tensor, mask: Tensor, sequence: bool) -> Tensor:
    log_weight = log_ratio.detach()
    if sequence:
        log_weight = whole_sequence(log_weight, mask, product=True)
    return log_weight.exp()
