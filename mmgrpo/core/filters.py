"""Filters: which samples enter the update. (trajectories, score ``[B]``) -> keep, bool.

``[B]`` keeps samples, ``[B, T]`` single decisions.

``score`` is the combined reward before shaping, so that a length penalty cannot make every group
look diverse (a pitfall of DAPO's dynamic sampling).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmgrpo.core import groups
from mmgrpo.core.credit import node_weight
from mmgrpo.core.trajectories import Trajectories

BEFORE_STATISTICS = frozenset({"uniform_groups"})
"""Filters whose samples leave the statistics too; the others only leave the loss."""


def uniform_groups(trajectories: Trajectories, score: Tensor) -> Tensor:
    """Leave out groups whose rewards are all equal (dynamic sampling, arXiv:2503.14476)."""
    return ~groups.uniform_groups(score, trajectories.group)


def truncated(trajectories: Trajectories, score: Tensor) -> Tensor:
    """Leave out samples that the length limit cut off (overlong filtering, arXiv:2503.14476).

    Their rewards still count in the group's baseline.
    """
    if trajectories.truncated is None:
        return torch.ones_like(trajectories.group, dtype=torch.bool)
    return ~trajectories.truncated


def zero_advantage(trajectories: Trajectories, score: Tensor) -> Tensor:
    """Leave out samples whose advantage is zero everywhere (Flow-GRPO, arXiv:2505.05470)."""
    if trajectories.advantage is None:
        return torch.ones_like(trajectories.group, dtype=torch.bool)
    return ((trajectories.advantage != 0) & trajectories.mask).any(dim=1)


def prune_leaves(trajectories: Trajectories, score: Tensor, *, keep: float = 0.5) -> Tensor:
    """Leave out the branches after the last split of middling leaves (BranchGRPO, 2509.06040).

    Of the n leaves of a group, ``keep n`` stay, half of them with the highest and half with the
    lowest advantage at their last decision; ties go to the earlier sample. Decisions up to and
    with the last split stay for all. Only the update gets cheaper: every leaf was drawn and scored.

    Returns:
        ``[B, T]`` bool.

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """
    _check_share(keep)
    mask, advantage = trajectories.mask, trajectories.advantage
    if trajectories.node is None or advantage is None:
        return torch.ones_like(mask)
    kept = _ends(trajectories, advantage, lambda size: max(int(keep * size + 1e-9) // 2, 1))
    return ~_after_last_split(trajectories) | kept[:, None]


def best_and_worst(trajectories: Trajectories, score: Tensor, *, count: int = 4) -> Tensor:
    """Keep the samples of a group with the highest and lowest advantages, ``count`` of each.

    DanceGRPO's best-of-N for videos (arXiv:2505.07818): 24 are drawn, scored and compared, 8 are
    trained.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}.")
    if trajectories.advantage is None:
        return torch.ones_like(trajectories.group, dtype=torch.bool)
    return _ends(trajectories, trajectories.advantage, lambda size: count)


def _ends(trajectories: Trajectories, advantage: Tensor, half: Callable[[int], int]) -> Tensor:
    """``[B]`` bool: the ``half(n)`` best and worst of n samples of a group, by their advantage."""
    mask = trajectories.mask
    last = mask.long().cumsum(dim=1).argmax(dim=1, keepdim=True)
    value = advantage.gather(1, last).squeeze(1)
    kept = torch.ones_like(trajectories.group, dtype=torch.bool)
    for group in torch.unique(trajectories.group):
        rows = ((trajectories.group == group) & mask.any(dim=1)).nonzero().squeeze(1)
        ends = half(len(rows))
        order = rows[value[rows].argsort(descending=True, stable=True)]
        kept[order[ends : max(len(rows) - ends, ends)]] = False
    return kept


def prune_steps(trajectories: Trajectories, score: Tensor, *, keep: float = 0.5) -> Tensor:
    """Leave out part of each branch after the last split (BranchGRPO, arXiv:2509.06040).

    Of the n decisions of a branch the ``keep n`` (rounded up) with the highest advantage stay, of
    equal ones the earlier. A leaf's decisions after its split normally are equal, so the later
    steps go: the public width pruning inside each branch.

    Returns:
        ``[B, T]`` bool.

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """
    _check_share(keep)
    mask, advantage = trajectories.mask, trajectories.advantage
    if trajectories.node is None or advantage is None:
        return torch.ones_like(mask)
    after = _after_last_split(trajectories)
    value = torch.where(after, advantage.double().round(decimals=6), -torch.inf)
    rank = value.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = (keep * after.sum(dim=1, keepdim=True) - 1e-9).ceil()
    return ~after | (rank < count)


def _check_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1]; got {keep}.")


def _after_last_split(trajectories: Trajectories) -> Tensor:
    """``[B, T]`` bool: decisions of one leaf alone, but for the split's own, the first of them."""
    alone = (node_weight(trajectories) > 0.75) & trajectories.mask
    return alone & (alone.cumsum(dim=1) > 1)
