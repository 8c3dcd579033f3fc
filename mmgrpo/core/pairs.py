"""Pairs: which two samples of a group a preference loss compares.

A component maps trajectories to ``[N, 2]`` int64 rows (preferred, rejected). In what it is given,
``reward`` ``[B]`` (the shaped sum) and ``rewards`` (each times its weight, so that more is better)
are NaN where a row cannot be paired: filtered out, or no reward applies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmgrpo.core.groups import DEGENERATE_RTOL
from mmgrpo.core.trajectories import Trajectories


def none(trajectories: Trajectories) -> Tensor:
    """No pairs: for objectives that compare no two samples."""
    return _stacked([], trajectories)


def given(trajectories: Trajectories) -> Tensor:
    """Keep the pairs that the rollout came with, where both rows can be paired."""
    if trajectories.pairs is None:
        raise ValueError("pairs 'given' needs rollouts that come with pairs, and these have none")
    there = ~_reward(trajectories).isnan()
    return trajectories.pairs[there[trajectories.pairs].all(dim=1)]


def best_worst(trajectories: Trajectories) -> Tensor:
    """Pair the best sample of each group with the worst; a group without spread has no pair."""
    return top_bottom(trajectories, count=1)


def top_bottom(trajectories: Trajectories, *, count: int = 2) -> Tensor:
    """Pair the best sample with the worst, the second best with the second worst, and so on.

    Args:
        trajectories: see the module.
        count: pairs of a group at most; ties have none, and no sample is in two.

    Returns:
        ``[N, 2]``.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}.")
    reward = _reward(trajectories)
    found = []
    for rows in _ranked(trajectories):
        half = min(count, len(rows) // 2)
        ends = zip(rows[:half], reversed(rows), strict=False)
        found += [(w, r) for w, r in ends if _above(reward[w], reward[r])]
    return _stacked(found, trajectories)


def dominance(trajectories: Trajectories) -> Tensor:
    """Pair samples of which one is better in every reward (D3PO, arXiv:2311.13231).

    From the best sum down, each sample that is still free takes the worst free one that it
    dominates. Samples that no partner is left for, such as incomparable ones, have no pair. A
    reward that does not apply to one of the two has no say.
    """
    table = torch.stack(list(trajectories.rewards.values()))
    found: list[tuple[int, int]] = []
    for rows in _ranked(trajectories):
        free = list(rows)
        while free:
            best = free.pop(0)
            beaten = [row for row in free if _dominates(table[:, best], table[:, row])]
            if beaten:
                free.remove(beaten[-1])
                found.append((best, beaten[-1]))
    return _stacked(found, trajectories)


def paired_signs(pairs: Tensor, like: Tensor) -> Tensor:
    """``[B]``: 1 for preferred and -1 for rejected rows, their mean for rows that are both, else 0.

    Args:
        pairs: ``[N, 2]``.
        like: ``[B]`` floats, for number of rows, dtype and device.
    """
    one = like.new_ones(len(pairs))
    total, count = torch.zeros_like(like), torch.zeros_like(like)
    for column, sign in enumerate((1, -1)):
        total.index_add_(0, pairs[:, column], sign * one)
        count.index_add_(0, pairs[:, column], one)
    return total / count.clamp_min(1)


def in_pairs(pairs: Tensor, mask: Tensor, *, by_decision: bool) -> Tensor:
    """``[B, T]`` bool: which decisions a pair compares.

    Args:
        pairs: ``[N, 2]``.
        mask: ``[B, T]`` bool.
        by_decision: decision t of a row is compared with decision t of its partner, so it needs
            one there; otherwise all decisions of paired rows.
    """
    partners = torch.zeros(mask.shape, device=mask.device)
    for own, other in ((0, 1), (1, 0)):
        there = mask[pairs[:, other]].float()
        partners.index_add_(0, pairs[:, own], there if by_decision else torch.ones_like(there))
    return mask & (partners > 0)


def _reward(trajectories: Trajectories) -> Tensor:
    if trajectories.reward is None:
        raise ValueError("pairs need trajectories.reward")
    return trajectories.reward


def _ranked(trajectories: Trajectories) -> Iterator[list[int]]:
    """Rows of each group that can be paired, best first; equals in the order of the rows."""
    reward = _reward(trajectories)
    for group in torch.unique(trajectories.group):
        rows = ((trajectories.group == group) & ~reward.isnan()).nonzero().squeeze(1)
        yield rows[reward[rows].argsort(descending=True, stable=True)].tolist()


def _above(one: Tensor, other: Tensor) -> bool:
    """Whether a reward is larger by more than float noise."""
    return bool(one - other > DEGENERATE_RTOL * torch.maximum(one.abs(), other.abs()))


def _dominates(one: Tensor, other: Tensor) -> bool:
    apply = ~(one.isnan() | other.isnan())
    pairs = zip(one[apply], other[apply], strict=True)
    return bool(apply.any()) and all(_above(mine, theirs) for mine, theirs in pairs)


def _stacked(found: list[tuple[int, int]], trajectories: Trajectories) -> Tensor:
    device = trajectories.group.device
    return torch.tensor(found, dtype=torch.int64, device=device).reshape(-1, 2)
