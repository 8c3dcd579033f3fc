"""From rewards to advantages: what is read, in which order, and in which type."""

import math
from dataclasses import replace

import pytest
import torch
from method_batches import PRESETS, load_method, make_batch

from mmgrpo.core import Trajectories
from mmgrpo.methods import Method
from mmgrpo.methods.components import with_default


def batch(rewards, groups=None, width=2, **fields):
    first = next(iter(rewards.values())) if isinstance(rewards, dict) else rewards
    size = len(first)
    named = rewards if isinstance(rewards, dict) else {}
    return Trajectories(
        group=torch.zeros(size) if groups is None else torch.tensor(groups),
        mask=torch.ones(size, width),
        rewards={name: torch.as_tensor(value).double() for name, value in named.items()},
        reward=None if named else torch.as_tensor(rewards),
        **fields,
    )


def first(method, t):
    return method.prepare(t).advantage[:, 0].tolist()


# -- what is read ---------------------------------------------------------------------------------


def test_a_reward_alone_is_enough():
    found = load_method("dr-grpo").prepare(batch([1.0, 0, 0, 0]))
    assert found.advantage.tolist() == [[0.75] * 2] + [[-0.25] * 2] * 3
    assert found.reward.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("combine", ["sum_then_normalise", "normalise_then_sum", "gdpo"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_rewards_of_any_type_are_used_as_numbers(dtype, combine):
    method = load_method("dr-grpo", reward={"combine": combine})
    rewards = torch.tensor([1, 0, 0, 0])
    wanted = first(method, batch(rewards.double()))
    assert first(method, batch(rewards.to(dtype))) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_of_the_rewards_is_that_of_the_advantages(name, dtype):
    prepared = load_method(name).prepare(make_batch(0, dtype).trajectories)
    assert prepared.advantage.dtype == dtype
    assert prepared.reward.dtype == dtype


def test_float32_rewards_far_from_zero_lose_no_digits():
    rewards = torch.tensor([20_000.0, 20_000.25, 20_001.0])  # exact in float32
    wanted = (rewards.double() - rewards.double().mean()).tolist()
    assert first(load_method("dr-grpo"), batch(rewards)) == pytest.approx(wanted, rel=1e-6)


def test_without_rewards_there_is_nothing_to_prepare():
    t = Trajectories(group=torch.zeros(2), mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match="neither rewards nor reward"):
        load_method("dr-grpo").prepare(t)


def test_an_infinite_reward_is_an_error_that_names_the_sample():
    with pytest.raises(ValueError, match=r"'reward' of sample 1 is infinite"):
        load_method("dr-grpo").prepare(batch([1.0, math.inf]))


@pytest.mark.parametrize("name", PRESETS)
def test_rows_stay_in_place_and_preparing_again_changes_nothing(name):
    method, t = load_method(name), make_batch(1).trajectories
    once = method.prepare(t)
    assert len(once) == len(t)
    assert torch.equal(once.group, t.group)
    assert (once.advantage[~once.mask] == 0).all()
    if not method.filters:
        torch.testing.assert_close(method.prepare(once).advantage, once.advantage)


def test_a_greedy_reward_that_is_missing_takes_the_sample_out():
    t = batch([1.0, 0.5], baseline_reward=torch.tensor([0.25, math.nan]))
    found = load_method("remax").prepare(t)
    assert found.advantage.tolist() == [[0.75, 0.75], [0, 0]]
    assert found.mask.tolist() == [[True, True], [False, False]]


# -- several rewards ------------------------------------------------------------------------------


def test_the_score_is_the_weighted_sum_of_the_rewards_that_apply():
    method = replace(load_method("dr-grpo"), reward_weights={"a": 2.0, "b": 0.5})
    t = batch({"a": [1, 0, math.nan], "b": [4, math.nan, math.nan]})
    assert method.score(t)[:2].tolist() == [4, 0]
    assert method.score(t)[2].isnan()
    assert method.prepare(t).reward[:2].tolist() == [4, 0]
    assert first(method, t) == [2, -2, 0]


def test_dance_grpo_normalises_each_reward_before_the_sum():
    t = batch({"a": [1, 0], "b": [0, 10]})
    assert first(load_method("dance-grpo"), t) == pytest.approx([0, 0], abs=1e-7)
    summed = load_method("dance-grpo", reward={"combine": "sum_then_normalise"})
    assert first(summed, t) == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


# -- shaping, penalty, clip -----------------------------------------------------------------------


def test_shaping_sees_the_sum_of_the_rewards_in_order():
    method = load_method(
        "reinforce-pp",
        reward={
            "kl": 0,
            "shaping": [
                {"name": "scale", "factor": 2.0, "offset": -1.0},
                {"name": "clip", "high": 2},
            ],
        },
        advantage={"whiten": None},
        credit="uniform",
    )
    found = method.prepare(batch({"a": [1, 0], "b": [2, 0]}))
    assert found.reward.tolist() == [2, -1]
    assert found.advantage[:, 0].tolist() == [2, -1]


def penalised(name, rewards, overrides, **fields):
    old = torch.full((2, 3), -1.0).double()
    ref = old - torch.tensor([[0.1, 0.2, 0.3], [0, 0, 0.5]])
    t = batch(rewards, width=3, old_log_prob=old, ref_log_prob=ref, **fields)
    return load_method(name, **overrides).prepare(t)


def test_the_penalty_on_the_sample_is_subtracted_once_whatever_the_number_of_rewards():
    for rewards in ([1.0, 0.0], {"a": [0.75, 0], "b": [0.25, 0]}):
        found = penalised("rloo", rewards, {"reward": {"kl": 0.1}})
        assert found.reward.tolist() == pytest.approx([0.94, -0.05])
        assert found.advantage[:, 0].tolist() == pytest.approx([0.99, -0.99])


def test_the_penalty_on_decisions_is_a_reward_to_go():
    overrides = {"reward": {"kl": 0.1}, "advantage": {"whiten": None}}
    found = penalised("reinforce-pp", [1.0, 0.0], overrides).advantage
    assert found[0].tolist() == pytest.approx([0.94, 0.95, 0.97])
    assert found[1].tolist() == pytest.approx([-0.05, -0.05, -0.05])
    earned = torch.tensor([[0, 0, 0], [0, 2.0, 0]])
    found = penalised("reinforce-pp", [1.0, 0.0], overrides, step_reward=earned)
    assert found.advantage[1].tolist() == pytest.approx([1.95, 1.95, -0.05])
    assert torch.equal(found.step_reward, earned)


def test_the_advantage_is_clipped_where_the_method_says_so():
    outlier = [100.0] + [0.0] * 99
    assert first(load_method("flow-grpo"), batch(outlier))[0] == 5.0
    assert first(load_method("dance-grpo"), batch(outlier))[0] == 5.0
    assert first(load_method("grpo"), batch(outlier))[0] == pytest.approx(9.9, rel=1e-3)


def test_gpg_caps_its_factor():
    rewards = [1.0, 0.0] + [0.5, 0.5] * 30
    groups = [g for g in range(31) for _ in range(2)]
    assert first(load_method("gpg"), batch(rewards, groups))[0] == 5.0  # 10 times 0.5


# -- filters --------------------------------------------------------------------------------------


def test_a_truncated_sample_is_not_trained_but_still_counts_in_the_baseline():
    t = batch([1.0, 0.0, 0.0, 0.0], truncated=torch.tensor([False, True, False, False]))
    prepared = load_method("dapo").prepare(t)
    plain = load_method("grpo", regulariser=None).prepare(t)
    assert torch.equal(prepared.advantage[[0, 2, 3]], plain.advantage[[0, 2, 3]])
    assert prepared.mask.any(dim=1).tolist() == [True, False, True, True]


def test_a_uniform_group_that_is_filtered_leaves_the_statistics_of_the_update():
    t = batch([1.0, 0.0, 9.0, 9.0], [0, 0, 1, 1])
    options = {"advantage": {"scale": "batch"}}
    filtered = load_method("dapo", **options).prepare(t)
    alone = load_method("dapo", **options).prepare(batch([1.0, 0.0]))
    assert torch.equal(filtered.advantage[:2], alone.advantage)
    assert not filtered.mask[2:].any()


def test_the_filter_looks_at_the_score_not_at_the_shaped_reward():
    shaping = [{"name": "clip", "high": 0.5}]
    t = batch([1.0, 0.6])
    prepared = load_method("dapo", reward={"shaping": shaping}).prepare(t)
    assert prepared.mask.all()
    assert (prepared.advantage == 0).all()


# -- needs ----------------------------------------------------------------------------------------

NEEDS = {
    "grpo": {"groups", "ref_log_prob"},
    "dr-grpo": {"groups"},
    "rloo": {"groups", "ref_log_prob"},
    "reinforce-pp": {"ref_log_prob"},
    "reinforce-pp-baseline": {"groups", "ref_log_prob"},
    "opo": {"groups", "on_policy"},
    "gpg": {"groups", "on_policy"},
    "remax": {"baseline_reward", "on_policy"},
    "cpgd": {"groups", "one_epoch"},
    "flow-grpo": {"groups", "ref_prediction"},
    "dance-grpo": {"groups"},
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_method_needs_what_it_reads_and_nothing_more(name):
    assert load_method(name).needs == NEEDS[name]


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        ({"regulariser": {"kl": {"coefficient": 0}}}, set()),
        ({"regulariser": {"kl": {"target": "old"}}}, set()),
        ({"regulariser": {"kl": {"estimator": "code"}}}, {"ref_prediction"}),
        ({"regulariser": {"kl": {"estimator": "exact", "target": "old"}}}, {"old_prediction"}),
        ({"regulariser": {"entropy": 0.01}}, {"ref_log_prob", "entropy"}),
        ({"ratio": "segment"}, {"ref_log_prob", "segment"}),
    ],
)
def test_needs_follow_the_options(overrides, needs):
    assert load_method("grpo", **overrides).needs == needs | {"groups"}


def test_the_request_asks_the_policy_for_what_the_loss_reads():
    flow = load_method("flow-grpo").request
    assert (flow.divergence, flow.divergence_target, flow.entropy) == ("code", "ref", False)
    text = load_method("grpo", regulariser={"entropy": 0.01}).request
    assert (text.divergence, text.entropy) == (None, True)
    off = load_method("flow-grpo", regulariser={"kl": {"coefficient": 0.0}}).request
    assert off.divergence is None


def test_the_trainers_length_limit_does_not_replace_the_users():
    t = Trajectories(group=torch.zeros(1), mask=torch.ones(1, 4), advantage=torch.ones(1, 4))
    for length, overrides in ((8, {"aggregate": {"length": 8}}), (16, {})):
        method = load_method("dr-grpo", **overrides)
        method = replace(method, aggregate=with_default(method.aggregate, length=16))
        assert method.loss(torch.zeros(1, 4), t).loss.item() == -4 / length


def test_a_mapping_composes_without_a_preset():
    method = Method.compose({"advantage": {"scale": "none"}, "objective": "reinforce"})
    assert method.id == "custom"
    assert first(method, batch([1.0, 0.0])) == [0.5, -0.5]
