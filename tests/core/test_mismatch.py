"""The distance between engine and policy: worked numbers, and an exact KL as the oracle."""

import math

import pytest
import torch

from mmgrpo.core.mismatch import mismatch_metrics, sampled_log_probs, worst_decisions
from mmgrpo.core.trajectories import Trajectories

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
ENGINE = torch.tensor([[-1.0, -2.0, -0.5, 9.0], [-3.0, -1.0, 9.0, 9.0]])
POLICY = torch.tensor([[-1.1, -1.0, -0.5, 0.0], [-3.5, -0.8, 0.0, 0.0]])


def trajectories(**changes):
    given = {"rollout_log_prob": ENGINE, "old_log_prob": POLICY, **changes}
    return Trajectories(group=torch.tensor([0, 1]), mask=MASK, **given)


def test_worked_numbers():
    gaps = [-0.1, 1.0, 0.0, -0.5, 0.2]
    found = mismatch_metrics(sampled_log_probs(trajectories()))
    assert set(found) == {
        "mismatch/kl", "mismatch/ratio_p50", "mismatch/ratio_p99", "mismatch/ratio_max",
    }  # fmt: skip
    assert found["mismatch/kl"] == pytest.approx(
        sum(math.exp(gap) - 1 - gap for gap in gaps) / 5, rel=1e-5
    )
    assert found["mismatch/ratio_p50"] == pytest.approx(1.0)
    assert found["mismatch/ratio_p99"] == found["mismatch/ratio_max"] == pytest.approx(math.e)


def test_a_quantile_is_not_exceeded_by_its_share():
    ratios = torch.arange(1, 201).double()
    pairs = torch.stack([torch.zeros(200).double(), ratios.log()], dim=-1)
    found = mismatch_metrics(pairs[torch.randperm(200)])
    assert found["mismatch/ratio_p50"] == pytest.approx(100)
    assert found["mismatch/ratio_p99"] == pytest.approx(198)
    assert found["mismatch/ratio_max"] == pytest.approx(200)


def test_the_kl_is_that_from_the_engine_to_the_policy():
    engine, policy = torch.randn(2, 6).double().log_softmax(-1)
    exact = float((engine.exp() * (engine - policy)).sum())
    drawn = torch.multinomial(engine.exp(), 200_000, replacement=True)
    found = mismatch_metrics(torch.stack([engine[drawn], policy[drawn]], dim=-1))
    assert found["mismatch/kl"] == pytest.approx(exact, rel=0.03)


def test_the_worst_come_first_and_nothing_outside_the_mask():
    assert worst_decisions(trajectories(), 2) == [[1, 0], [0, 1]]
    assert worst_decisions(trajectories(), 9) == [[1, 0, 2], [0, 1]]


def test_without_an_engine_or_an_evaluation_there_is_nothing_to_say():
    for changes in ({"rollout_log_prob": None}, {"old_log_prob": None}):
        assert sampled_log_probs(trajectories(**changes)) is None
        assert worst_decisions(trajectories(**changes), 2) == [[], []]
    assert mismatch_metrics(torch.zeros(0, 2)) == {}
