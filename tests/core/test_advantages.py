"""Baselines, scales and whitening: the cards' worked numbers, identities and degenerate groups."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo.core import advantages
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods.components import with_default

BASELINES = {
    "group": advantages.group_baseline,
    "leave_one_out": advantages.leave_one_out_baseline,
    "length_weighted": advantages.length_weighted_baseline,
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def batch(group, lengths=None, **fields):
    """Trajectories of the given groups and lengths (default 3)."""
    group = torch.as_tensor(group)
    lengths = torch.full_like(group, 3) if lengths is None else torch.as_tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return Trajectories(group=group, mask=mask, **fields)


def centred(name, rewards, lengths=None):
    r = tensor(rewards)
    return r - BASELINES[name](r, batch([0] * len(rewards), lengths))


def scaled(scale, rewards, groups, *, ddof=1, eps=0.0):
    r, t = tensor(rewards), batch(groups)
    c = r - advantages.group_baseline(r, t)
    return c / with_default(scale, ddof=ddof, eps=eps)(r, c, t)


def test_group_z_score_of_the_grpo_card():
    found = scaled(advantages.group_scale, [1, 0, 0, 0], [0] * 4)
    torch.testing.assert_close(found, tensor([1.5, -0.5, -0.5, -0.5]))
    found = scaled(advantages.group_scale, [1, 0, 0, 0], [0] * 4, ddof=0)
    assert found.tolist() == pytest.approx([1.7321, -0.5774, -0.5774, -0.5774], abs=5e-5)


def test_centred_rewards_of_the_dr_grpo_rloo_and_loop_cards():
    assert centred("group", [1, 0, 0, 0]).tolist() == [0.75, -0.25, -0.25, -0.25]
    third = -1 / 3
    assert centred("leave_one_out", [1, 0, 0, 0]).tolist() == pytest.approx(
        [1, third, third, third]
    )
    assert centred("leave_one_out", [1, 3, 2, 6]).tolist() == pytest.approx([-8 / 3, 0, -4 / 3, 4])


def test_length_weighted_baseline_of_the_opo_card():
    assert centred("length_weighted", [1, 0, 1], [10, 20, 30]).tolist() == pytest.approx(
        [1 / 3, -2 / 3, 1 / 3]
    )
    assert centred("length_weighted", [1, 0, 1], [10, 30, 20]).tolist() == pytest.approx(
        [0.5, -0.5, 0.5]
    )


def test_length_counts_trained_decisions_not_padding_or_tool_tokens():
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    t = Trajectories(group=torch.zeros(2), mask=mask)
    assert advantages.length_weighted_baseline(tensor([1, 0]), t).tolist() == pytest.approx(
        [2 / 3] * 2
    )


def test_greedy_baseline_of_the_remax_card():
    t = batch([0, 0], baseline_reward=tensor([1.2, 1.2]))
    r = tensor([1.7, 1.2])
    assert (r - advantages.greedy_baseline(r, t)).tolist() == pytest.approx([0.5, 0])
    with pytest.raises(ValueError, match="baseline_reward"):
        advantages.greedy_baseline(r, batch([0, 0]))


rewards = st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=2, max_size=8)


@given(rewards)
def test_dr_grpo_is_rloo_times_g_minus_one_over_g(values):
    size = len(values)
    torch.testing.assert_close(
        centred("group", values), centred("leave_one_out", values) * (size - 1) / size
    )


@given(rewards, st.integers(1, 9))
def test_opo_with_equal_lengths_is_the_group_mean(values, length):
    torch.testing.assert_close(
        centred("length_weighted", values, [length] * len(values)), centred("group", values)
    )


@given(rewards, st.integers(0, 7))
def test_a_leave_one_out_advantage_has_slope_one_in_its_own_reward(values, i):
    values = [*values, max(values) + 1]  # never degenerate
    i %= len(values) - 1
    moved = values.copy()
    moved[i] -= 0.125
    change = centred("leave_one_out", values)[i] - centred("leave_one_out", moved)[i]
    assert change.item() == pytest.approx(0.125)
    assert centred("leave_one_out", values).sum().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_with_noise_have_advantage_exactly_zero(name, dtype):
    r = 0.7 + torch.tensor([1e-9, 0, -1e-9, 3e-10], dtype=dtype)
    t = batch([5] * 4, [1, 2, 3, 4])
    assert (r - BASELINES[name](r, t)).tolist() == [0.0] * 4


@pytest.mark.parametrize("name", BASELINES)
def test_a_group_of_one_has_baseline_zero_and_scale_one(name):
    r, t = tensor([0.7, 1.0, 0.0]), batch([0, 1, 1], [2, 3, 4])
    baseline = BASELINES[name](r, t)
    assert baseline[0] == 0
    assert advantages.group_scale(r, r - baseline, t, ddof=0, eps=0.0)[0] == 1


@pytest.mark.parametrize("name", BASELINES)
def test_a_reward_that_does_not_apply_is_as_good_as_absent(name):
    r, t = tensor([0.2, math.nan, 0.9, 0.4]), batch([0, 0, 0, 0], [2, 9, 3, 4])
    rest = torch.tensor([0, 2, 3])
    torch.testing.assert_close(
        BASELINES[name](r, t)[rest], BASELINES[name](r[rest], t.select(rest))
    )


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shift", [1.0, -17.3])
def test_a_constant_added_to_a_group_changes_nothing(name, shift):
    r, t = tensor([0.2, 0.5, 0.9, 0.4]), batch([0] * 4, [2, 9, 3, 4])
    torch.testing.assert_close(
        r - BASELINES[name](r, t), (r + shift) - BASELINES[name](r + shift, t)
    )


def test_batch_scales_against_the_standard_library():
    values, groups = [1.0, 0.0, 0.5, 0.25, 3.0], [0, 0, 1, 1, 1]
    mean = [0.5, 0.5, 1.25, 1.25, 1.25]
    c = [v - m for v, m in zip(values, mean, strict=True)]
    for ddof, std in ((1, statistics.stdev), (0, statistics.pstdev)):
        raw = scaled(advantages.batch_scale, values, groups, ddof=ddof, eps=1e-4)
        assert raw.tolist() == pytest.approx([x / (std(values) + 1e-4) for x in c])
        own = scaled(advantages.batch_centred_scale, values, groups, ddof=ddof, eps=1e-4)
        assert own.tolist() == pytest.approx([x / (std(c) + 1e-4) for x in c])


def test_batch_scale_leaves_out_what_does_not_apply():
    r, t = tensor([1.0, math.nan, 0.0, 0.5]), batch([0] * 4)
    options = {"ddof": 1, "eps": 0.0}
    assert advantages.batch_scale(r, r, t, **options).item() == pytest.approx(0.5)
    lonely = tensor([math.nan, 2.0])
    assert advantages.batch_scale(lonely, lonely, batch([0, 0]), **options).item() == 1


def test_no_scale_is_one_whatever_the_eps():
    assert scaled(advantages.no_scale, [1.0, 0.0], [0, 0], eps=0.1).tolist() == [0.5, -0.5]


def test_valid_group_factor_of_the_gpg_card():
    spread, flat = [1.0, 0.0], [0.3, 0.3]
    r = tensor(spread * 6 + flat * 2)
    t = batch([g for g in range(8) for _ in range(2)])
    assert advantages.valid_group_factor(r, t, cap=10).item() == pytest.approx(8 / 6)
    assert advantages.valid_group_factor(r, t, cap=1.2).item() == pytest.approx(1.2)
    assert advantages.valid_group_factor(torch.ones(16), t, cap=10).item() == 8


def test_valid_group_factor_counts_groups_not_samples():
    r, t = tensor([1, 0, 0, 0, 0, 2, 2]), batch([0, 0, 0, 0, 0, 1, 1])
    assert advantages.valid_group_factor(r, t, cap=10).item() == 2
    r[5:] = math.nan
    assert advantages.valid_group_factor(r, t, cap=10).item() == 1


def test_whitening_numbers_of_the_reinforce_pp_card():
    c = tensor([0.5, -0.5, 0, 0])
    for length in (1, 3):
        spread, weight = c[:, None].repeat(1, length), torch.ones(4, length)
        found = advantages.whiten(spread, weight)[:, 0]
        assert found.tolist() == pytest.approx([1.4142, -1.4142, 0, 0], abs=5e-5)
        bessel = math.sqrt((4 * length - 1) / (4 * length))
        found = advantages.whiten(spread, weight, unbiased=True)[:, 0]
        assert found.tolist() == pytest.approx(
            [math.sqrt(2) * bessel, -math.sqrt(2) * bessel, 0, 0]
        )


def test_whitening_counts_decisions():
    """Centred rewards 0.5 on one token and -0.5 on nine have token mean -0.4."""
    spread = torch.cat([tensor([0.5]), tensor([-0.5] * 9)])
    found = advantages.whiten(spread, torch.ones(10))
    assert (found[0] / found[1]).item() == pytest.approx(0.9 / -0.1)
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.var(correction=0).item() == pytest.approx(1)


@given(st.lists(st.tuples(st.floats(-4, 4), st.sampled_from([0.0, 0.25, 1.0])), min_size=2))
def test_whitened_values_have_weighted_mean_zero_and_variance_one(pairs):
    x, w = tensor([a for a, _ in pairs]), tensor([b for _, b in pairs])
    kept = x[w > 0]
    found = advantages.whiten(x, w)
    assert (found[w == 0] == 0).all()
    if len(kept) == 0 or (kept - kept.mean()).abs().max() < 1e-3:
        assert found.isfinite().all()
        return
    assert ((found * w).sum() / w.sum()).item() == pytest.approx(0, abs=1e-7)
    assert ((found**2 * w).sum() / w.sum()).item() == pytest.approx(1)


def test_whitening_equal_values_gives_zero_not_noise():
    x = torch.full((7,), 0.7, dtype=torch.float32)
    assert advantages.whiten(x, torch.ones(7)).abs().max() < 1e-6
    assert advantages.whiten(x, torch.zeros(7)).tolist() == [0.0] * 7


def test_whitening_many_float32_decisions_loses_no_digits():
    x = 1000 + torch.rand(200_000)
    found = advantages.whiten(x, torch.ones_like(x))
    exact = (x.double() - x.double().mean()) / x.double().std(correction=0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_mean_scale_of_the_maxrl_card():
    advantage = scaled(advantages.mean_scale, [1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0])
    assert advantage.tolist() == pytest.approx([3, -1, -1, -1])
