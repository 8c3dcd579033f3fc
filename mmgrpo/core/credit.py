"""Credit: how a sample's advantage ``[B]`` spreads over its decisions ``[B, T]``."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.groups import group_index
from mmgrpo.core.trajectories import Trajectories

COMPARES_GROUP = frozenset({"depthwise"})
"""Credits that compare the samples of a group with each other."""


def uniform(advantage: Tensor, trajectories: Trajectories) -> Tensor:
    """Every decision of a sample carries the sample's advantage."""
    return advantage[:, None] * trajectories.mask


def reward_to_go(advantage: Tensor, trajectories: Trajectories, *, gamma: float = 1.0) -> Tensor:
    """The sample's advantage arrives at its last decision, step rewards where they were earned.

    A_t = sum_{u >= t} gamma^(u-t) R_u with R_u = step_reward_u + 1[u last] advantage, counted over
    masked-in decisions (REINFORCE++, arXiv:2501.03262).
    """
    mask = trajectories.mask
    remaining = mask.long().flip(1).cumsum(1).flip(1)
    steps = advantage[:, None] * (remaining == 1)
    if trajectories.step_reward is not None:
        steps = steps + trajectories.step_reward.to(advantage.dtype)
    returns = torch.zeros_like(steps)
    running = torch.zeros_like(advantage)
    for t in reversed(range(mask.shape[1])):
        running = torch.where(mask[:, t], steps[:, t] + gamma * running, running)
        returns[:, t] = running
    return returns * mask


def depthwise(
    advantage: Tensor,
    trajectories: Trajectories,
    *,
    clip: float = 5.0,
    min_std: float = 1e-6,
    std_eps: float = 1e-8,
) -> Tensor:
    """Reward of a tree's node against all nodes of its depth (BranchGRPO, arXiv:2509.06040).

    A node's reward is the mean of its leaves'; it is normalised by mean and sample standard
    deviation over the group's distinct nodes at that depth. A depth with one node, or without
    spread, has advantage 0. Without shared decisions this is the group's z-score.

    Args:
        advantage: ``[B]`` the leaves' rewards: the method's baseline and scale are ``none``.
        trajectories: their decisions.
        clip: bound of the absolute value.
        min_std: standard deviation below which a depth has no spread.
        std_eps: added to the standard deviation.
    """
    spread = uniform(advantage, trajectories)
    fused = spread if trajectories.node is None else node_mean(spread, trajectories)
    once = node_weight(trajectories, advantage.dtype)
    index, groups = group_index(trajectories.group)

    def over_nodes(value: Tensor) -> Tensor:
        total = value.new_zeros(groups, value.shape[1])
        return total.index_add(0, index, value * once)[index]

    count = over_nodes(torch.ones_like(fused))
    centred = (fused - over_nodes(fused) / count.clamp_min(1.0)) * trajectories.mask
    std = (over_nodes(centred**2) / (count - 1).clamp_min(1.0)).sqrt()
    usable = (count > 1.5) & (std >= min_std)
    scaled = torch.where(usable, centred / (std + std_eps), torch.zeros_like(centred))
    return scaled.clamp(-clip, clip)


def step_std(advantage: Tensor, trajectories: Trajectories) -> Tensor:
    """Noisier denoising steps carry more: A s_t / mean s (TempFlow-GRPO, arXiv:2508.04324).

    The mean is over all steps of the schedule that can draw noise, trained in this sample or not.
    """
    std = _step_field(trajectories, "step_std").to(advantage.dtype)
    count = (std > 0).sum(dim=1, keepdim=True).clamp_min(1)
    scale = std / (std.sum(dim=1, keepdim=True) / count).clamp_min(1e-12)
    return advantage[:, None] * scale * trajectories.mask


def inverse_step_length(advantage: Tensor, trajectories: Trajectories) -> Tensor:
    """A / (-dt): every denoising step's gradient gets one size (GRPO-Guard, arXiv:2510.22319)."""
    length = _step_field(trajectories, "step_length").to(advantage.dtype)
    safe = torch.where(trajectories.mask, length, torch.ones_like(length))
    return advantage[:, None] / safe * trajectories.mask


def _step_field(trajectories: Trajectories, name: str) -> Tensor:
    value: Tensor | None = getattr(trajectories, name)
    if value is None:
        raise ValueError(f"this credit is for denoising steps: it needs trajectories.{name}")
    return value


def node_mean(value: Tensor, trajectories: Trajectories) -> Tensor:
    """Average ``value [B, T]`` over the rows of a group that share a decision; 0 off the mask."""
    total, count = _node_sums(value, trajectories)
    return torch.where(trajectories.mask, total / count.clamp_min(1.0), torch.zeros_like(value))


def node_weight(trajectories: Trajectories, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[B, T]``: 1 / (number of rows sharing the decision), so that it counts once.

    Only masked-in decisions count. Without ``node`` ids every decision is its own.
    """
    one = trajectories.mask.to(dtype)
    if trajectories.node is None:
        return one
    return one / _node_sums(one, trajectories)[1].clamp_min(1.0)


def _node_sums(value: Tensor, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
    """``[B, T]`` sum of ``value`` and number of rows, over the rows that share the decision."""
    if trajectories.node is None:
        raise ValueError("shared decisions need trajectories.node")
    mask, node = trajectories.mask, trajectories.node
    group = group_index(trajectories.group)[0][:, None].expand_as(node)
    keys, index = torch.unique(
        torch.stack([group, node], dim=-1).flatten(0, 1), dim=0, return_inverse=True
    )
    weight = mask.to(value.dtype)
    masked = torch.where(mask, value, torch.zeros_like(value))
    sums = value.new_zeros(2, len(keys))
    sums.index_add_(1, index, torch.stack([masked.flatten(), weight.flatten()]))
    total, count = sums[:, index].unflatten(1, node.shape)
    return total, count
