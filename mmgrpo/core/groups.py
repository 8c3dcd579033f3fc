"""Statistics over prompt groups. Every function returns one value per sample, ``[B]``.

NaN marks a sample that a reward does not apply to: it enters no sum and no count, as if the group
did not contain it.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEGENERATE_RTOL = 1e-5
"""Spread, relative to the magnitude, below which a group of rewards counts as uniform.

Float noise in equal non-integer rewards stays below it; see the pitfalls of GRPO: dividing such
noise by its own standard deviation gives advantages of order one.
"""


def group_index(group: Tensor) -> tuple[Tensor, int]:
    """Renumber group ids ``[B]`` to 0..P-1; return (index ``[B]``, P)."""
    ids, index = torch.unique(group, return_inverse=True)
    return index, len(ids)


def zero_nan(x: Tensor) -> Tensor:
    """``x`` with 0 in place of NaN."""
    return torch.where(x.isnan(), torch.zeros_like(x), x)


def group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Sum of ``x [B]`` over each sample's group, NaNs left out."""
    index, count = group_index(group)
    return x.new_zeros(count).index_add_(0, index, zero_nan(x))[index]


def group_count(x: Tensor, group: Tensor) -> Tensor:
    """Number of samples in each sample's group to which ``x [B]`` applies."""
    return group_sum((~x.isnan()).to(x.dtype), group)


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Mean of ``x [B]`` over each sample's group; 0 where nothing applies."""
    return group_sum(x, group) / group_count(x, group).clamp_min(1.0)


def group_std(x: Tensor, group: Tensor, *, ddof: int = 1) -> Tensor:
    """Standard deviation over each sample's group; 1 where fewer than two samples apply.

    ``ddof`` 1 is the sample, 0 the population standard deviation.
    """
    count = group_count(x, group)
    squares = group_sum((x - group_mean(x, group)) ** 2, group)
    std = (squares / (count - ddof).clamp_min(1.0)).sqrt()
    return torch.where(count > 1, std, torch.ones_like(std))


def leave_one_out_mean(x: Tensor, group: Tensor) -> Tensor:
    """Mean of the *other* samples of the group; 0 where there is none (RLOO, arXiv:2402.14740)."""
    others = group_count(x, group) - (~x.isnan()).to(x.dtype)
    total = group_sum(x, group) - zero_nan(x)
    return torch.where(others > 0, total / others.clamp_min(1.0), torch.zeros_like(total))


def best_row(x: Tensor, group: Tensor) -> Tensor:
    """``[B]`` int64: the row of the sample's group with the largest ``x [B]``, the first of equal.

    NaN counts as the smallest.
    """
    index, count = group_index(group)
    value = torch.where(x.isnan(), torch.full_like(x, -torch.inf), x)
    highest = value.new_full((count,), -torch.inf).scatter_reduce(0, index, value, "amax")
    row = torch.arange(len(x), device=x.device)
    candidate = torch.where(value == highest[index], row, len(x))
    return row.new_full((count,), len(x)).scatter_reduce(0, index, candidate, "amin")[index]


def uniform_groups(x: Tensor, group: Tensor, *, rtol: float = DEGENERATE_RTOL) -> Tensor:
    """``[B]`` bool: the sample's group has no spread (max - min <= rtol * max |x|).

    A group with fewer than two samples to which ``x`` applies has none.
    """
    index, count = group_index(group)
    high = x.new_full((count,), -torch.inf)
    low = x.new_full((count,), torch.inf)
    high = high.scatter_reduce(0, index, torch.where(x.isnan(), high[index], x), "amax")
    low = low.scatter_reduce(0, index, torch.where(x.isnan(), low[index], x), "amin")
    uniform = high - low <= rtol * torch.maximum(high.abs(), low.abs())
    return uniform[index]
