"""Reward shaping: (reward ``[B]``, trajectories) -> reward ``[B]``, before any baseline."""

from __future__ import annotations

import math

from torch import Tensor

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
