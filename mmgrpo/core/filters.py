"""Filters: which samples enter the update. (trajectories, score ``[B]``) -> keep ``[B]`` bool.

``score`` is the combined reward before shaping, so that a length penalty cannot make every group
look diverse (a pitfall of DAPO's dynamic sampling).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core import groups
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
