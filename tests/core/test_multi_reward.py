"""Several rewards: weights, order of normalisation, rewards that do not apply."""

import math

import pytest
import torch

from mmgrpo.core.advantages import group_baseline
from mmgrpo.core.groups import group_std
from mmgrpo.core.multi_reward import gdpo, normalise_then_sum, sum_then_normalise, weighted_sum
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods import load_method

NAN = math.nan


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def z_score(groups):
    """Group z-score with the population standard deviation."""
    t = Trajectories(group=torch.tensor(groups), mask=torch.ones(len(groups), 1).bool())

    def normalise(reward):
        std = group_std(reward, t.group, ddof=0)
        return (reward - group_baseline(reward, t)) / (std + 1e-12)

    return normalise


def test_numbers_of_the_gdpo_card():
    rewards = {"a": tensor(1, 0), "b": tensor(0, 10)}
    normalise = z_score([0, 0])
    torch.testing.assert_close(sum_then_normalise(rewards, {}, normalise), tensor(-1, 1))
    torch.testing.assert_close(normalise_then_sum(rewards, {}, normalise), tensor(0, 0))
    torch.testing.assert_close(gdpo(rewards, {}, normalise), tensor(0, 0))


def test_weights_scale_their_reward():
    rewards = {"a": tensor(1, 0), "b": tensor(0, 10)}
    weights = {"a": 3.0, "b": 0.5}
    torch.testing.assert_close(weighted_sum(rewards, weights), tensor(3, 5))
    found = normalise_then_sum(rewards, weights, z_score([0, 0]))
    torch.testing.assert_close(found, tensor(2.5, -2.5))


def test_one_reward_makes_both_orders_equal_and_gdpo_a_whitened_z_score():
    rewards = {"a": tensor(1, 0, 0, 2, 5)}
    normalise = z_score([0, 0, 0, 1, 1])
    plain = sum_then_normalise(rewards, {}, normalise)
    torch.testing.assert_close(normalise_then_sum(rewards, {}, normalise), plain)
    whitened = (plain - plain.mean()) / plain.std(correction=1)
    torch.testing.assert_close(gdpo(rewards, {}, normalise), whitened)


def test_a_reward_that_is_constant_in_its_group_adds_nothing():
    normalise = z_score([0, 0, 0])
    a = {"a": tensor(1, 0, 0)}
    found = normalise_then_sum({**a, "b": tensor(0.7, 0.7, 0.7)}, {}, normalise)
    torch.testing.assert_close(found, normalise_then_sum(a, {}, normalise))


def test_a_sum_is_over_the_rewards_that_apply():
    rewards = {"a": tensor(1, NAN, NAN), "b": tensor(2, 3, NAN)}
    found = weighted_sum(rewards, {"b": 2.0})
    assert found[:2].tolist() == [5, 6]
    assert found[2].isnan()


def test_a_sample_without_any_reward_stays_out_of_every_combination():
    rewards = {"a": tensor(1, 0, NAN, 3), "b": tensor(0, 1, NAN, 4)}
    without = {name: r[[0, 1, 3]] for name, r in rewards.items()}
    for combine in (sum_then_normalise, normalise_then_sum, gdpo):
        found = combine(rewards, {}, z_score([0, 0, 0, 0]))
        assert found[2].isnan()
        torch.testing.assert_close(found[[0, 1, 3]], combine(without, {}, z_score([0, 0, 0])))


def test_a_reward_for_some_samples_only_is_compared_among_those():
    found = normalise_then_sum(
        {"a": tensor(1, 0, NAN, 0.5), "b": tensor(1, NAN, 0, NAN)}, {}, z_score([0] * 4)
    )
    std = tensor(1, 0, 0.5).std(correction=0)
    torch.testing.assert_close(found, tensor(0.5 / std + 1, -0.5 / std, -1, 0))


def test_unit_weights_have_the_sum_one_and_the_sum_is_clamped_after():
    """MixGRPO: only their proportion counts; a term beyond the bound is not cut by itself."""
    rewards = {"a": tensor(1, 0), "b": tensor(0, 10)}
    normalise = z_score([0, 0])
    unit = {"unit_weights": True}
    found = normalise_then_sum(rewards, {"a": 3.0}, normalise, **unit)
    torch.testing.assert_close(found, tensor(0.5, -0.5))
    same = normalise_then_sum(rewards, {"a": 30.0, "b": 10.0}, normalise, **unit)
    torch.testing.assert_close(found, same)
    weights = {"a": 7.0, "b": 3.0}  # 7 - 3, not 5 - 3
    found = normalise_then_sum(rewards, weights, normalise, clip=5.0)
    torch.testing.assert_close(found, tensor(4, -4))
    assert normalise_then_sum(rewards, weights, normalise, clip=3.5).tolist() == [3.5, -3.5]
    with pytest.raises(ValueError, match="positive sum"):
        normalise_then_sum(rewards, {"a": 0.0, "b": 0.0}, normalise, **unit)


def test_mix_grpo_clamps_the_sum_and_dance_grpo_each_term():
    outlier = torch.zeros(64)
    outlier[0] = 1  # a z-score of 7.875
    t = Trajectories(
        group=torch.zeros(64), mask=torch.ones(64, 1), rewards={"a": outlier, "b": -outlier}
    )
    for name, wanted in (("dance-grpo", 0.0), ("mix-grpo", 0.0)):
        assert load_method(name).prepare(t).advantage[0].item() == wanted
    t = t.replace(rewards={"a": outlier, "b": torch.zeros(64)})
    assert load_method("dance-grpo").prepare(t).advantage[0].item() == 5.0
    assert load_method("mix-grpo").prepare(t).advantage[0].item() == pytest.approx(7.875 / 2)
