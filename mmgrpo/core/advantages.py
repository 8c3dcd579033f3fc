"""Baselines and scales: how rewards ``[B]`` become sample advantages ``[B]``.

A baseline is a function (reward, trajectories) -> ``[B]``; a scale is a function
(reward, centred, trajectories) -> divisor ``[B]``. Both see the whole update through the
collective. NaN rewards stay NaN and end as advantage 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.groups import group_mean, group_std, group_sum, leave_one_out_mean
from mmgrpo.core.trajectories import Trajectories


def no_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """0: the reward itself is the signal."""
    return torch.zeros_like(reward)


def group_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Mean reward of the group (GRPO, arXiv:2402.03300)."""
    return group_mean(reward, trajectories.group)


def leave_one_out_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Mean reward of the group's other samples (RLOO, arXiv:2402.14740)."""
    return leave_one_out_mean(reward, trajectories.group)


def length_weighted_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Length-weighted mean reward: sum T_i r_i / sum T_i (OPO, arXiv:2505.23585).

    The variance-minimising baseline if a sample's squared gradient norm grows with its length.
    """
    length = trajectories.lengths.to(reward.dtype)
    length = torch.where(reward.isnan(), torch.zeros_like(length), length)
    weighted = group_sum(reward * length, trajectories.group)
    return weighted / group_sum(length, trajectories.group).clamp_min(1.0)


def greedy_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Reward of the group's greedy sample (ReMax, arXiv:2310.10505)."""
    if trajectories.baseline_reward is None:
        raise ValueError("the greedy baseline needs trajectories.baseline_reward")
    return trajectories.baseline_reward.to(reward.dtype)


def no_scale(reward: Tensor, centred: Tensor, trajectories: Trajectories, **_: object) -> Tensor:
    """1: no division (Dr. GRPO, arXiv:2503.20783)."""
    return torch.ones_like(reward)


def group_scale(
    reward: Tensor, centred: Tensor, trajectories: Trajectories, *, ddof: int, **_: object
) -> Tensor:
    """Standard deviation of the group's rewards (GRPO)."""
    return group_std(reward, trajectories.group, ddof=ddof)


def batch_scale(
    reward: Tensor,
    centred: Tensor,
    trajectories: Trajectories,
    *,
    ddof: int,
    collective: Collective = LOCAL,
) -> Tensor:
    """Standard deviation of the raw rewards of the whole update (Flow-GRPO's code default)."""
    return _batch_std(reward, ddof, collective).expand_as(reward)


def batch_centred_scale(
    reward: Tensor,
    centred: Tensor,
    trajectories: Trajectories,
    *,
    ddof: int,
    collective: Collective = LOCAL,
) -> Tensor:
    """Standard deviation of the group-centred rewards of the whole update."""
    return _batch_std(centred, ddof, collective).expand_as(reward)


def _batch_std(x: Tensor, ddof: int, collective: Collective) -> Tensor:
    values = collective.gather(x)
    values = values[~values.isnan()]
    return values.std(correction=ddof) if len(values) > ddof else x.new_ones(())


def whiten(
    advantage: Tensor,
    weight: Tensor,
    *,
    unbiased: bool = False,
    eps: float = 1e-8,
    collective: Collective = LOCAL,
) -> Tensor:
    """Shift and scale ``advantage`` to weighted mean 0 and variance 1 over the whole update.

    Args:
        advantage: ``[B, T]`` (decisions) or ``[B]`` (samples).
        weight: same shape; 0 leaves an entry out. Decision weights make long samples count more.
        unbiased: use Bessel's correction.
        eps: floor of the variance.

    Source: REINFORCE++ (arXiv:2501.03262), over the rollout batch, never over a micro-batch.
    """
    count = collective.sum(weight.sum())
    mean = collective.sum((advantage * weight).sum()) / count.clamp_min(1.0)
    squares = collective.sum(((advantage - mean) ** 2 * weight).sum())
    variance = squares / (count - float(unbiased)).clamp_min(1.0)
    return (advantage - mean) / variance.clamp_min(eps).sqrt() * (weight > 0)
