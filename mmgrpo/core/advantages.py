"""Baselines and scales: how rewards ``[B]`` become sample advantages ``[B]``.

A baseline is a function (reward, trajectories) -> ``[B]``; a scale is a function
(reward, centred, trajectories) -> divisor, ``[B]`` or ``[]``. Both see whole groups. By keyword
they get what they name: the whole update through ``collective``, and a scale the method's ``ddof``
and ``eps``. NaN rewards enter no statistic and stay NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.collective import LOCAL, Collective, moments
from mmgrpo.core.groups import (
    group_count,
    group_index,
    group_mean,
    group_std,
    group_sum,
    leave_one_out_mean,
    uniform_groups,
    zero_nan,
)
from mmgrpo.core.trajectories import Trajectories

GROUP_BASELINES = frozenset({"group", "leave_one_out", "length_weighted", "stratum"})
"""Baselines that compare the samples of a group, and say nothing about a group of one."""


def no_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """0: the reward itself is the signal."""
    return torch.zeros_like(reward)


def group_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Mean reward of the group (GRPO, arXiv:2402.03300)."""
    return _compared(group_mean(reward, trajectories.group), reward, trajectories)


def leave_one_out_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Mean reward of the group's other samples (RLOO, arXiv:2402.14740)."""
    return _compared(leave_one_out_mean(reward, trajectories.group), reward, trajectories)


def length_weighted_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Length-weighted mean reward: sum T_i r_i / sum T_i (OPO, arXiv:2505.23585).

    The variance-minimising baseline if a sample's squared gradient norm grows with its length.
    """
    length = trajectories.lengths.to(reward.dtype)
    length = torch.where(reward.isnan(), torch.zeros_like(length), length)
    total = group_sum(zero_nan(reward) * length, trajectories.group)
    mean = total / group_sum(length, trajectories.group).clamp_min(1.0)
    return _compared(mean, reward, trajectories)


def _compared(baseline: Tensor, reward: Tensor, trajectories: Trajectories) -> Tensor:
    """The baseline but for degenerate groups: 0 for a group of one, the reward if all are equal.

    Equal rewards then have an advantage of exactly 0, whatever the rounding of their mean.
    """
    alone = group_count(reward, trajectories.group) < 2
    uniform = uniform_groups(reward, trajectories.group)
    baseline = torch.where(uniform, reward, baseline)
    return torch.where(alone, torch.zeros_like(baseline), baseline)


def greedy_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Reward of the group's greedy sample (ReMax, arXiv:2310.10505)."""
    if trajectories.baseline_reward is None:
        raise ValueError("the greedy baseline needs trajectories.baseline_reward")
    return trajectories.baseline_reward.to(reward.dtype)


def history_baseline(
    reward: Tensor, trajectories: Trajectories, *, collective: Collective = LOCAL
) -> Tensor:
    """Mean of the prompt's last rewards (DDPO, arXiv:2305.13301).

    Where they are too few to be known, the mean of the whole update.
    """
    _, mean, _ = moments(zero_nan(reward), ~reward.isnan(), collective)
    return _remembered(trajectories.history_mean, mean, reward)


def _remembered(history: Tensor | None, otherwise: Tensor, reward: Tensor) -> Tensor:
    fallback = otherwise.to(reward.dtype).expand_as(reward)
    if history is None:
        return fallback
    return torch.where(history.isnan(), fallback, history.to(reward.dtype))


def no_scale(reward: Tensor, centred: Tensor, trajectories: Trajectories) -> Tensor:
    """1: no division (Dr. GRPO, arXiv:2503.20783)."""
    return torch.ones_like(reward)


def group_scale(
    reward: Tensor, centred: Tensor, trajectories: Trajectories, *, ddof: int, eps: float
) -> Tensor:
    """Standard deviation of the group's rewards, plus eps (GRPO)."""
    return group_std(reward, trajectories.group, ddof=ddof) + eps


def batch_scale(
    reward: Tensor,
    centred: Tensor,
    trajectories: Trajectories,
    *,
    ddof: int,
    eps: float,
    collective: Collective = LOCAL,
) -> Tensor:
    """Standard deviation of the update's raw rewards, plus eps (Flow-GRPO's code default)."""
    return _update_std(reward, ddof, collective) + eps


def batch_centred_scale(
    reward: Tensor,
    centred: Tensor,
    trajectories: Trajectories,
    *,
    ddof: int,
    eps: float,
    collective: Collective = LOCAL,
) -> Tensor:
    """Standard deviation of the update's group-centred rewards, plus eps."""
    return _update_std(centred, ddof, collective) + eps


def history_scale(
    reward: Tensor,
    centred: Tensor,
    trajectories: Trajectories,
    *,
    ddof: int,
    eps: float,
    collective: Collective = LOCAL,
) -> Tensor:
    """Population standard deviation of the prompt's last rewards, plus eps (DDPO).

    Where they are too few to be known, that of the update's rewards (with ``ddof``).
    """
    own = _update_std(reward, ddof, collective)
    return _remembered(trajectories.history_std, own, reward) + eps


def mean_scale(
    reward: Tensor, centred: Tensor, trajectories: Trajectories, *, eps: float
) -> Tensor:
    """Mean reward of the group, plus eps: hard prompts count more (MaxRL).

    For rewards that are not negative; approximates the maximum likelihood of success.
    """
    return group_mean(reward, trajectories.group) + eps


def _update_std(x: Tensor, ddof: int, collective: Collective) -> Tensor:
    count, _, squares = moments(zero_nan(x), ~x.isnan(), collective)
    std = (squares / (count - ddof).clamp_min(1.0)).sqrt()
    return torch.where(count > 1, std, torch.ones_like(std)).to(x.dtype)


def valid_group_factor(
    reward: Tensor, trajectories: Trajectories, *, cap: float, collective: Collective = LOCAL
) -> Tensor:
    """min(cap, B / (B - M)) of B groups, M without spread (GPG, arXiv:2504.02546).

    Undoes the shrinking of the update by groups that carry no signal. A group to which the reward
    applies nowhere is not counted.
    """
    index, count = group_index(trajectories.group)
    groups = torch.zeros(2, count, dtype=torch.double, device=index.device)
    groups[0, index] = (group_count(reward, trajectories.group) > 0).double()
    groups[1, index] = (~uniform_groups(reward, trajectories.group)).double()
    present, valid = collective.sum(groups.sum(dim=1))
    return (present / valid.clamp_min(1.0)).clamp_max(cap)


def whiten(
    advantage: Tensor,
    weight: Tensor,
    *,
    unbiased: bool = False,
    eps: float = 1e-8,
    collective: Collective = LOCAL,
) -> Tensor:
    """Shift and scale ``advantage`` to weighted mean 0 and variance 1 over the whole update.

    Over the rollout batch, never over a micro-batch (REINFORCE++, arXiv:2501.03262).

    Args:
        advantage: ``[B, T]`` (decisions) or ``[B]`` (samples).
        weight: same shape; 0 leaves an entry out. Decision weights make long samples count more.
        unbiased: use Bessel's correction.
        eps: floor of the variance.
        collective: reaches the other ranks.
    """
    count, mean, squares = moments(advantage, weight, collective)
    freedom = count - float(unbiased)
    variance = squares / torch.where(freedom > 0, freedom, torch.ones_like(freedom))
    whitened = (advantage - mean) / variance.clamp_min(eps).sqrt()
    return torch.where(weight > 0, whitened, torch.zeros_like(whitened)).to(advantage.dtype)
