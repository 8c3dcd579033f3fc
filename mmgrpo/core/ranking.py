"""Ranks instead of scores: what a judge that only orders candidates says about each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.groups import group_index, zero_nan
from mmgrpo.core.trajectories import Trajectories


def rank_graph(
    reward: Tensor, trajectories: Trajectories, *, top: int = 1, published_code: bool = False
) -> Tensor:
    """Weight of each candidate in a ranking's direction (ZO-RankSGD, arXiv:2303.03751).

    A judge orders the ``top`` best of a group of m candidates. The graph has an edge (i better than
    j) from each of them to all that come after it, and the direction is
    g = (1/|E|) sum over edges (xi_i - xi_j). Collected by candidate, g = mean_i w_i xi_i with
    w_i = (edges from i - edges to i) m / |E|; the weights of a group sum to 0. Without ties the
    candidate at place t (from 0) has m - 1 - 2t edges more from it than to it, those that are not
    ranked have -top. Equal rewards have no edge between them.

    Args:
        reward: ``[B]``; NaN takes no part and stays NaN.
        trajectories: the samples' groups.
        top: how many of a group are ranked; at most m.
        published_code: m - 2t for the ranked ones, as the authors' program has it, whose weights
            do not sum to 0 and which therefore drifts along the mean of the ranked candidates.

    Returns:
        ``[B]`` weights w.

    Raises:
        ValueError: ``top`` is less than 1.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}")
    index, count = group_index(trajectories.group)
    weights = torch.full_like(reward, torch.nan)
    for number in range(count):
        rows = ((index == number) & ~reward.isnan()).nonzero().squeeze(1)
        weights[rows] = _weights(reward[rows], top, published_code)
    return weights


def _weights(reward: Tensor, top: int, published_code: bool) -> Tensor:
    """``[m]`` weights of one group."""
    order = reward.argsort(descending=True, stable=True)
    ranked = torch.zeros_like(reward, dtype=torch.bool)
    ranked[order[:top]] = True
    better = ranked[:, None] & (reward[:, None] > reward[None, :])
    edges = better.sum()
    node = (better.sum(dim=1) - better.sum(dim=0)).to(reward.dtype)
    if published_code:
        node = node + ranked.to(reward.dtype)
    return zero_nan(node * len(reward) / edges) if edges > 0 else torch.zeros_like(reward)
