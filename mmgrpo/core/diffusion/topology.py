"""How the samples of a group share denoising steps: independent, branches of an anchor, a tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def places(steps: Sequence[int | float], count: int) -> list[int]:
    """Return rising, distinct steps; a float is a share of ``count``, rounded down."""
    return sorted({math.floor(s * count + 1e-9) if isinstance(s, float) else s for s in steps})


def fan_out(owner: Tensor, level: int, copies: int) -> Tensor:
    """Let every sample go on ``copies`` times from the state at ``level``, which they share.

    Args:
        owner: ``[G, T + 1]`` int64, see :meth:`Tree.owners`.
        level: last shared level.
        copies: how often; the rows of the first copy come first.

    Returns:
        ``[copies G, T + 1]`` int64.
    """
    own = torch.arange(owner.shape[1]) > level
    offset = torch.arange(copies)[:, None, None] * len(owner)
    return (owner + offset * own).flatten(0, 1)


@dataclass(frozen=True)
class Tree:
    """A state has several children at the split steps and one at every other step.

    The samples of a group are the leaves, in order; siblings share every state before their split.
    A group with more samples than a tree has leaves is several trees. Without splits every sample
    is its own tree: a linear rollout.

    Attributes:
        splits: denoising steps at which a state has several children, or ``stochastic``: all that
            draw noise. A fraction names the step at that share of the schedule; equal steps are
            one split. A split step must draw noise, or the children would be equal.
        width: children at a split; None shares the group's samples out among ``roots`` trees,
            which then have one split.
        roots: number of trees where ``width`` is None.
    """

    splits: tuple[int | float, ...] | Literal["stochastic"] = ()
    width: int | None = 2
    roots: int = 1

    def __post_init__(self) -> None:
        if (self.width is not None and self.width < 1) or self.roots < 1:
            raise ValueError(
                f"width and roots must be at least 1; got {self.width} and {self.roots}."
            )
        if self.splits != "stochastic" and any(a < 0 for a in self.splits):
            raise ValueError(f"split steps must not be negative; got {list(self.splits)}.")

    @property
    def linear(self) -> bool:
        """Whether no state is ever shared."""
        return self.splits == () or self.width == 1

    def split_steps(self, stochastic: Tensor) -> list[int]:
        """Return the rising split steps of a rollout whose steps draw noise where ``[T]`` says so.

        Raises:
            ValueError: a split where no noise is drawn.
        """
        drawn = stochastic.nonzero().flatten().tolist()
        if self.splits == "stochastic":
            return drawn
        splits = places(self.splits, len(stochastic))
        silent = sorted(set(splits) - set(drawn))
        if silent:
            raise ValueError(f"split steps {silent} draw no noise; the steps that do: {drawn}.")
        return splits

    def owners(self, group_size: int, stochastic: Tensor, *, shared_start: bool = False) -> Tensor:
        """Return ``[G, T + 1]`` int64: the first sample of the group with the same state.

        Samples that share a state share it until one of them draws noise of its own.

        Args:
            group_size: G.
            stochastic: ``[T]`` bool, steps that draw noise.
            shared_start: whether all samples start from one noise.

        Raises:
            ValueError: the group is no whole number of trees, or a split draws no noise.
        """
        member = torch.arange(group_size)
        linear = self.linear or not stochastic.any()
        splits = [] if linear else self.split_steps(stochastic)
        width = 1 if linear else self._width(group_size, splits)
        block = width ** len(splits)
        if group_size % block:
            raise ValueError(
                f"a group of {group_size} is no multiple of the tree's {block} leaves "
                f"({len(splits)} splits into {width})."
            )
        columns = [torch.zeros_like(member) if shared_start else member // block * block]
        for index, draws in enumerate(stochastic.tolist()):
            size = block // width ** sum(split <= index for split in splits)
            columns.append(member // size * size if draws else columns[-1])
        return torch.stack(columns, dim=1)

    def _width(self, group_size: int, splits: Sequence[int]) -> int:
        if self.width is not None:
            return self.width
        if len(splits) != 1:
            raise ValueError(
                f"a tree with {len(splits)} splits needs a width; None is for one split."
            )
        if group_size % self.roots:
            raise ValueError(f"a group of {group_size} is no multiple of {self.roots} roots.")
        return group_size // self.roots
