"""Baseline and scale within a stratum: samples of a group that were drawn in the same way.

Samples of one prompt that differ in how they were drawn (in the granularity of their denoising,
say) are compared only with those drawn alike. Without strata these are the group's.
"""

from __future__ import annotations

from torch import Tensor

from mmgrpo.core.advantages import group_baseline, group_scale
from mmgrpo.core.groups import group_index
from mmgrpo.core.trajectories import Trajectories


def stratum_baseline(reward: Tensor, trajectories: Trajectories) -> Tensor:
    """Mean reward of the group's samples of the same stratum (G2RPO, arXiv:2510.01982)."""
    return group_baseline(reward, by_stratum(trajectories))


def stratum_scale(
    reward: Tensor, centred: Tensor, trajectories: Trajectories, *, ddof: int, eps: float
) -> Tensor:
    """Standard deviation of the group's rewards within the stratum, plus eps."""
    return group_scale(reward, centred, by_stratum(trajectories), ddof=ddof, eps=eps)


def by_stratum(trajectories: Trajectories) -> Trajectories:
    """The trajectories with every stratum of a group as a group of its own."""
    if trajectories.stratum is None:
        return trajectories
    stratum, count = group_index(trajectories.stratum)
    group = group_index(trajectories.group)[0] * count + stratum
    return trajectories.replace(group=group)
