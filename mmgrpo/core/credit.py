"""Credit: how a sample's advantage ``[B]`` spreads over its decisions ``[B, T]``."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.groups import group_index
from mmgrpo.core.trajectories import Trajectories

COMPARES_GROUP = frozenset({"depthwise"})
"""Credits that compare the samples of a group with each other."""


def uniform(advantage: Tensor, trajectories: Trajectories, *, factor: float = 1.0) -> Tensor:
    """Every decision of a sample carries the sample's advantage, times a factor."""
    return factor * advantage[:, None] * trajectories.mask


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
    temperature: float | None = None,
) -> Tensor:
    """Reward of a tree's node against all nodes of its depth (BranchGRPO, arXiv:2509.06040).

    A node's reward is the mean of its leaves', or the mean of its children weighted by how likely
    they were, see :func:`path_mean`; it is normalised by mean and sample standard
    deviation over the group's distinct nodes at that depth. A depth with one node, or without
    spread, has advantage 0. Without shared decisions this is the group's z-score.

    Args:
        advantage: ``[B]`` the leaves' rewards: the method's baseline and scale are ``none``.
        trajectories: their decisions.
        clip: bound of the absolute value.
        min_std: standard deviation below which a depth has no spread.
        std_eps: added to the standard deviation.
        temperature: tau of the path weights; None: every leaf counts the same.
    """
    fused = _fused(advantage, trajectories, temperature)
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


def _fused(leaf: Tensor, trajectories: Trajectories, temperature: float | None) -> Tensor:
    """``[B, T]`` reward of the node that each decision leads to."""
    if trajectories.node is None:
        return uniform(leaf, trajectories)
    if temperature is None:
        return node_mean(uniform(leaf, trajectories), trajectories)
    return path_mean(leaf, trajectories, temperature=temperature)


def path_mean(leaf: Tensor, trajectories: Trajectories, *, temperature: float) -> Tensor:
    """Fuse the leaves' rewards upwards, likely paths counting more (BranchGRPO).

    r_n = sum_c softmax_c(log p(edge_c) / tau) r_c over the children c of a node, with the
    behaviour policy's log-probabilities.

    Args:
        leaf: ``[B]`` reward of each row.
        trajectories: decisions with ``node`` and ``old_log_prob``.
        temperature: tau; infinity weighs all children of a node the same.

    Returns:
        ``[B, T]`` reward of the node that each decision leads to; 0 off the mask.

    Raises:
        ValueError: something is missing, or tau is not positive.
    """
    node, old, mask = trajectories.node, trajectories.old_log_prob, trajectories.mask
    if node is None or old is None:
        raise ValueError("path weights need trajectories.node and trajectories.old_log_prob")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    group, once = group_index(trajectories.group)[0], node_weight(trajectories, leaf.dtype)
    fused = torch.zeros_like(once)
    below, edge, share = leaf, torch.zeros_like(leaf), torch.ones_like(leaf)
    for t in reversed(range(mask.shape[1])):
        on = mask[:, t]
        keys = torch.stack([group, torch.where(on, node[:, t], -1)], dim=1)
        index = torch.unique(keys, dim=0, return_inverse=True)[1]
        highest = edge.scatter_reduce(0, index, edge, "amax", include_self=False)[index]
        weight = share * (edge - highest).exp()
        total, norm = (
            torch.zeros_like(leaf).index_add(0, index, x)[index] for x in (weight * below, weight)
        )
        fused[:, t] = torch.where(on, total / norm, fused[:, t])
        below = torch.where(on, fused[:, t], below)
        edge = torch.where(on, old[:, t].to(leaf.dtype) / temperature, edge)
        share = torch.where(on, once[:, t], share)
    return fused


def node_sum(advantage: Tensor, trajectories: Trajectories, *, clip: float = 5.0) -> Tensor:
    """A decision carries the sum over the rows that share it, bounded (G2RPO, arXiv:2510.01982).

    The rows are the granularities on which one noise was continued, each row's advantage being
    that among its own stratum.

    Args:
        advantage: ``[B]``.
        trajectories: their decisions.
        clip: bound of the sum's absolute value.
    """
    spread = uniform(advantage, trajectories)
    total = spread if trajectories.node is None else _node_sums(spread, trajectories)[0]
    return (total * trajectories.mask).clamp(-clip, clip)


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


def carried_once(trajectories: Trajectories) -> Trajectories:
    """Let the first of the rows that share a decision carry it alone, with the weight of all.

    A sum over decisions stays what it is, and a batch that is cut evaluates nothing twice.
    """
    if trajectories.node is None:
        return trajectories
    mask = trajectories.mask
    index, count = _node_index(trajectories)
    row = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    candidate = torch.where(mask, row, len(mask)).flatten()
    first = row.new_full((count,), len(mask)).scatter_reduce(0, index, candidate, "amin")
    mask = mask & (first[index].reshape(row.shape) == row)
    weight = _node_sums(trajectories.decision_weight, trajectories)[0]
    return trajectories.replace(mask=mask, weight=weight * mask)


def _node_sums(value: Tensor, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
    """``[B, T]`` sum of ``value`` and number of rows, over the rows that share the decision."""
    mask = trajectories.mask
    index, count = _node_index(trajectories)
    weight = mask.to(value.dtype)
    masked = torch.where(mask, value, torch.zeros_like(value))
    sums = value.new_zeros(2, count)
    sums.index_add_(1, index, torch.stack([masked.flatten(), weight.flatten()]))
    total, rows = sums[:, index].unflatten(1, mask.shape)
    return total, rows


def _node_index(trajectories: Trajectories) -> tuple[Tensor, int]:
    """``[B * T]`` number of each decision, and how many there are."""
    if trajectories.node is None:
        raise ValueError("shared decisions need trajectories.node")
    node = trajectories.node
    group = group_index(trajectories.group)[0][:, None].expand_as(node)
    pairs = torch.stack([group, node], dim=-1).flatten(0, 1)
    keys, index = torch.unique(pairs, dim=0, return_inverse=True)
    return index, len(keys)
