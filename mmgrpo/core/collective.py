"""Statistics over the whole update pass through here, so that N ranks give what one gives."""

from __future__ import annotations

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
