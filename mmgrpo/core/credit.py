"""Credit: how a sample's advantage ``[B]`` spreads over its decisions ``[B, T]``."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories


def uniform(advantage: Tensor, trajectories: Trajectories) -> Tensor:
    """Every decision of a sample carries the sample's advantage."""
    return advantage[:, None] * trajectories.mask


def reward_to_go(
    advantage: Tensor, trajectories: Trajectories, *, gamma: float = 1.0
) -> Tensor:
    """The sample's advantage arrives at its last decision, step rewards where they were earned.

    A_t = sum_{u >= t} gamma^(u-t) R_u with R_u = step_reward_u + 1[u last] advantage, counted over
    masked-in decisions (REINFORCE++, arXiv:2501.03262).
    """
    mask = trajectories.mask
    steps = torch.zeros_like(mask, dtype=advantage.dtype)
    if trajectories.step_reward is not None:
        steps = trajectories.step_reward.to(advantage.dtype) * mask
    later = mask.long().flip(1).cumsum(1).flip(1)
    last = mask & (later == 1)
    steps = steps + advantage[:, None] * last
    returns = torch.zeros_like(steps)
    running = torch.zeros_like(advantage)
    for t in reversed(range(mask.shape[1])):
        running = torch.where(mask[:, t], steps[:, t] + gamma * running, running)
        returns[:, t] = running
    return returns * mask


def node_mean(value: Tensor, node: Tensor, mask: Tensor) -> Tensor:
    """Average ``value [B, T]`` over the rows that share a decision (equal ``node`` ids)."""
    ids, index = torch.unique(node, return_inverse=True)
    weight = mask.to(value.dtype)
    total = value.new_zeros(len(ids)).index_add_(0, index.flatten(), (value * weight).flatten())
    count = value.new_zeros(len(ids)).index_add_(0, index.flatten(), weight.flatten())
    return (total / count.clamp_min(1.0))[index] * weight


def node_weight(node: Tensor, mask: Tensor) -> Tensor:
    """``[B, T]`` float: 1 / (number of rows sharing the decision), so that it counts once."""
    ids, index = torch.unique(node, return_inverse=True)
    count = torch.zeros(len(ids), device=node.device)
    count.index_add_(0, index.flatten(), mask.flatten().float())
    return mask / count.clamp_min(1.0)[index]
