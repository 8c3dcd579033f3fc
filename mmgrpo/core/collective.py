"""Statistics over the whole update pass through here, so that N ranks give what one gives."""

from __future__ import annotations

import torch
from torch import Tensor


class Collective:
    """The collective of a single process; the trainer supplies the distributed one."""

    rank = 0
    size = 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum ``value`` over ranks."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """Concatenate ``[N_rank, ...]`` values of all ranks, in rank order."""
        return value


LOCAL = Collective()


def moments(
    x: Tensor, weight: Tensor, collective: Collective = LOCAL
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (total weight, weighted mean, weighted sum of squared deviations) over all ranks.

    Args:
        x: finite values of any shape; summed in float64.
        weight: same shape.
        collective: reaches the other ranks.
    """
    x, weight = x.double(), weight.double()
    count, total = collective.sum(torch.stack([weight.sum(), (x * weight).sum()]))
    mean = total / torch.where(count > 0, count, torch.ones_like(count))
    return count, mean, collective.sum(((x - mean) ** 2 * weight).sum())
