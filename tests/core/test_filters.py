"""Which samples the filters keep, and reward shaping."""

import math

import torch

from mmgrpo.core import filters, shaping
from mmgrpo.core.trajectories import Trajectories


def batch(groups, **fields):
    return Trajectories(
        group=torch.tensor(groups), mask=torch.ones(len(groups), 2).bool(), **fields
    )


def test_uniform_groups_go():
    score = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.7, 0.7 + 1e-9, 2.0, math.nan, math.nan])
    found = filters.uniform_groups(batch([0, 0, 1, 1, 2, 2, 3, 4, 4]), score)
    assert found.tolist() == [False, False, True, True, False, False, False, False, False]


def test_truncated_samples_go_where_they_are_known():
    score = torch.zeros(3)
    known = batch([0, 0, 1], truncated=torch.tensor([True, False, True]))
    assert filters.truncated(known, score).tolist() == [False, True, False]
    assert filters.truncated(batch([0, 0, 1]), score).all()


def test_samples_without_advantage_go():
    advantage = torch.tensor([[0.0, 0.0], [0.0, 1e-9], [-1.0, 0.0], [3.0, 3.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 0]]).bool()
    t = batch([0, 0, 1, 1], advantage=advantage).replace(mask=mask)
    assert filters.zero_advantage(t, torch.zeros(4)).tolist() == [False, True, True, False]
    assert filters.zero_advantage(t.replace(advantage=None), torch.zeros(4)).all()


def test_only_dynamic_sampling_changes_the_statistics():
    assert {"uniform_groups"} == filters.BEFORE_STATISTICS


def test_shaping_bounds_and_scales():
    reward = torch.tensor([-9.0, 0.5, math.nan])
    clipped = shaping.clip(reward, batch([0, 0, 0]), low=-5, high=5)
    assert clipped[:2].tolist() == [-5, 0.5]
    assert clipped[2].isnan()
    assert shaping.clip(reward, batch([0, 0, 0]))[0] == -9
    assert shaping.scale(reward, batch([0, 0, 0]), factor=2, offset=-1)[:2].tolist() == [-19, 0]
