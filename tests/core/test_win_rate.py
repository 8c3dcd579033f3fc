"""Win rates within the group: the published numbers, ties, and what does not matter to an order."""

import math

import pytest
import torch

from mmgrpo.core import Trajectories
from mmgrpo.core.groups import best_row
from mmgrpo.core.shaping import win_rate
from mmgrpo.methods import load_method


def rates(values, groups=None, **options):
    groups = [0] * len(values) if groups is None else groups
    t = Trajectories(group=torch.tensor(groups), mask=torch.ones(len(values), 1))
    return win_rate(torch.tensor(values, dtype=torch.float64), t, **options)


SCORES = [9.0, 0.0, 0.6, 1.2]
"""Beats all; the others tie with their neighbours at a margin of 1: 3, .5, 1 and 1.5 wins."""


def test_the_published_example():
    found = rates(SCORES, margin=1.0)
    assert found.tolist() == pytest.approx([1, 1 / 6, 1 / 3, 1 / 2])
    method = load_method("pref-grpo", reward={"shaping": {"name": "win_rate", "margin": 1.0}})
    t = Trajectories(
        group=torch.zeros(4), mask=torch.ones(4, 1), rewards={"r": torch.tensor(SCORES).double()}
    )
    advantage = method.prepare(t).advantage.flatten().tolist()
    assert advantage == pytest.approx([1.3887, -0.9258, -0.4629, 0], abs=1e-4)
    rounded = load_method("pref-grpo", reward={"shaping": None})
    t = t.replace(rewards={"r": torch.tensor([1, 0.167, 0.333, 0.5]).double()})
    advantage = rounded.prepare(t).advantage.flatten().tolist()
    assert advantage == pytest.approx([1.3889, -0.9250, -0.4639, 0], abs=1e-4)


def test_the_rates_of_a_group_sum_to_half_of_it():
    values = (torch.rand(12, generator=torch.Generator().manual_seed(0)) * 4).round().tolist()
    groups = [0, 1, 2] * 4
    found = rates(values, groups)
    for group in range(3):
        assert found[group::3].sum().item() == pytest.approx(2)
    for i, rate in enumerate(found.tolist()):
        others = [values[j] for j in range(12) if j != i and groups[j] == groups[i]]
        wins = sum((values[i] > v) + 0.5 * (values[i] == v) for v in others)
        assert rate == pytest.approx(wins / 3)


def test_only_the_order_counts():
    values = torch.randn(7, generator=torch.Generator().manual_seed(1)).double()
    found = rates(values.tolist())
    assert torch.equal(rates(values.exp().tolist()), found)
    assert torch.equal(rates((0.1 * values + 5).tolist()), found)
    assert sorted(found.tolist()) == pytest.approx([i / 6 for i in range(7)])


def test_rounding_is_a_tie_and_who_is_alone_or_unscored_stays_out():
    assert rates([0.7, 0.7 + 1e-9, 0.7 - 1e-9]).tolist() == [0.5] * 3
    found = rates([1.0, math.nan, 2.0, 3.0], [0, 0, 0, 5])
    assert found[[0, 2, 3]].tolist() == [0.0, 1.0, 0.5]
    assert found[1].isnan()


def test_each_reward_has_its_own_win_rate():
    rewards = {"a": torch.tensor([0.0, 1, 2]), "b": torch.tensor([5.0, 5, 4])}
    t = Trajectories(group=torch.zeros(3), mask=torch.ones(3, 1), rewards=rewards)
    found = load_method("pref-grpo").prepare(t).advantage.flatten()
    wins = torch.tensor([[0, 0.5, 1], [0.75, 0.75, 0]])
    z = (wins - wins.mean(dim=1, keepdim=True)) / wins.std(dim=1, keepdim=True)
    torch.testing.assert_close(found, z.sum(dim=0))


def test_the_best_row_of_a_group():
    x = torch.tensor([1.0, math.nan, 3.0, 3.0, math.nan, -2.0])
    assert best_row(x, torch.tensor([7, 7, 2, 2, 9, 7])).tolist() == [0, 0, 2, 2, 4, 0]


def test_gdpo_whitens_the_sum_over_the_batch():
    rewards = {"a": torch.randn(8).double(), "b": torch.randn(8).double()}
    t = Trajectories(group=torch.arange(8) // 4, mask=torch.ones(8, 1), rewards=rewards)
    plain, second = (
        load_method("pref-grpo", reward={"combine": combine}).prepare(t).advantage.flatten()
        for combine in ("normalise_then_sum", "gdpo")
    )
    torch.testing.assert_close(second, (plain - plain.mean()) / plain.std())
