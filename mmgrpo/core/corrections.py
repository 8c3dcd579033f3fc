"""Weights for the mismatch between the engine that sampled and the policy that trains.

With l = old_log_prob - rollout_log_prob, each function maps l ``[B, T]`` to a detached weight
``[B, T]``. Without a separate engine l is 0 and every weight is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.ratios import LOG_RATIO_LIMIT, segment_reduce


def none(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """1."""
    return torch.ones_like(log_ratio)


def _weight(log_ratio: Tensor, mask: Tensor, sequence: bool) -> Tensor:
    if sequence:
        whole = torch.zeros_like(log_ratio, dtype=torch.int64)
        log_ratio = segment_reduce(log_ratio, mask, whole, mean=False)
    return log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def truncated(
    log_ratio: Tensor, mask: Tensor, *, cap: float = 2.0, sequence: bool = False
) -> Tensor:
    """min(exp(l), cap): truncated importance weights (TIS).

    Args:
        sequence: use the product over the sample instead of each decision's own weight.
    """
    return _weight(log_ratio, mask, sequence).clamp_max(cap)


def masked(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    low: float = 0.5,
    high: float = 2.0,
    sequence: bool = False,
) -> Tensor:
    """exp(l) inside [low, high], 0 outside: masked importance weights (MIS, IcePop)."""
    weight = _weight(log_ratio, mask, sequence)
    return torch.where((weight >= low) & (weight <= high), weight, torch.zeros_like(weight))
