"""Reward shaping: (reward ``[B]``, trajectories) -> reward ``[B]``, before any baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmgrpo.core.groups import DEGENERATE_RTOL, group_count
from mmgrpo.core.trajectories import Trajectories


def clip(
    reward: Tensor, trajectories: Trajectories, *, low: float = -math.inf, high: float = math.inf
) -> Tensor:
    """Bound the reward to [low, high]."""
    return reward.clamp(low, high)


def scale(
    reward: Tensor, trajectories: Trajectories, *, factor: float = 1.0, offset: float = 0.0
) -> Tensor:
    """Return factor * reward + offset, for instance 0/1 to -1/+1."""
    return factor * reward + offset


def win_rate(reward: Tensor, trajectories: Trajectories, *, margin: float = 0.0) -> Tensor:
    """Share of the group's other samples that a sample beats (Pref-GRPO, arXiv:2508.20751).

    R_i = sum_{j != i} w_ij / (G - 1), w_ij 1 for a win, 0 for a loss and 0.5 for a tie. Only the
    order counts, so scores that hardly differ are not blown up by a small standard deviation. The
    mean of a group is 0.5. A sample alone has 0.5.

    Args:
        reward: ``[B]``; NaN takes no part.
        trajectories: the samples' groups.
        margin: rewards that differ by no more are a tie, as are those that differ by rounding only.
    """
    ahead = reward[:, None] - reward[None, :]
    magnitude = torch.maximum(reward.abs()[:, None], reward.abs()[None, :])
    tie = (DEGENERATE_RTOL * magnitude).clamp_min(margin)
    verdict = (ahead > tie).to(reward.dtype) + 0.5 * (ahead.abs() <= tie)
    group = trajectories.group
    met = (group[:, None] == group[None, :]) & ~ahead.isnan()
    met = met & ~torch.eye(len(reward), dtype=torch.bool, device=met.device)
    others = (group_count(reward, group) - 1).clamp_min(1.0)
    rate = (verdict * met).sum(dim=1) / others
    rate = torch.where(met.any(dim=1), rate, torch.full_like(rate, 0.5))
    return torch.where(reward.isnan(), reward, rate)
