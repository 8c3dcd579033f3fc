"""Group statistics against the standard library, sample by sample."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo.core.groups import (
    group_count,
    group_mean,
    group_std,
    group_sum,
    leave_one_out_mean,
    uniform_groups,
)

NAN = math.nan


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def siblings(values, groups, i):
    """Applicable values of sample i's group, by brute force."""
    return [v for v, g in zip(values, groups, strict=True) if g == groups[i] and not math.isnan(v)]


ragged = st.lists(
    st.tuples(
        st.one_of(st.just(NAN), st.floats(-5, 5).map(lambda x: round(x, 3))), st.integers(-2, 3)
    ),
    min_size=1,
    max_size=14,
)


def test_worked_numbers_of_the_grpo_card():
    r, g = tensor([1, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)
    assert group_mean(r, g).tolist() == [0.25] * 4
    assert group_std(r, g, ddof=1).tolist() == [0.5] * 4
    assert group_std(r, g, ddof=0)[0].item() == pytest.approx(0.4330127)
    torch.testing.assert_close(leave_one_out_mean(r, g), tensor([0, 1 / 3, 1 / 3, 1 / 3]))


@given(ragged)
def test_statistics_of_ragged_groups_with_missing_values(rows):
    values, groups = [v for v, _ in rows], [g for _, g in rows]
    x, g = tensor(values), torch.tensor(groups)
    found = {
        "sum": group_sum(x, g),
        "count": group_count(x, g),
        "mean": group_mean(x, g),
        "sample": group_std(x, g, ddof=1),
        "population": group_std(x, g, ddof=0),
        "others": leave_one_out_mean(x, g),
        "uniform": uniform_groups(x, g),
    }
    for i, value in enumerate(values):
        mine = siblings(values, groups, i)
        others = mine.copy()
        if not math.isnan(value):
            others.remove(value)
        several = len(mine) > 1
        close = pytest.approx
        assert found["sum"][i].item() == close(math.fsum(mine), abs=1e-9)
        assert found["count"][i] == len(mine)
        assert found["mean"][i].item() == close(statistics.fmean(mine) if mine else 0, abs=1e-9)
        assert found["sample"][i].item() == close(
            statistics.stdev(mine) if several else 1, abs=1e-7
        )
        assert found["population"][i].item() == close(
            statistics.pstdev(mine) if several else 1, abs=1e-7
        )
        assert found["others"][i].item() == close(
            statistics.fmean(others) if others else 0, abs=1e-9
        )
        assert bool(found["uniform"][i]) == (len(set(mine)) < 2)


@given(ragged, st.randoms(use_true_random=False))
def test_a_permutation_of_the_samples_permutes_the_statistics(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    x, g = tensor([v for v, _ in rows]), torch.tensor([g for _, g in rows])
    for function in (group_mean, group_std, leave_one_out_mean, uniform_groups):
        torch.testing.assert_close(function(x, g)[order], function(x[order], g[order]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.7, -3.3, 1234.5])
def test_float_noise_in_equal_rewards_is_no_spread(value, dtype):
    noise = torch.tensor([0.0, 1e-9, -1e-9, 5e-10], dtype=dtype)
    assert uniform_groups(value + noise, torch.zeros(4, dtype=torch.int64)).all()
    summed = sum(torch.tensor([value / 10], dtype=dtype) for _ in range(10))  # not exactly value
    assert uniform_groups(
        torch.cat([summed, torch.tensor([value], dtype=dtype)]), torch.zeros(2)
    ).all()


@pytest.mark.parametrize("rewards", [[1.0, 1.001], [0.0, 1e-6], [-1e-3, 1e-3], [100.0, 100.1]])
def test_a_small_but_real_difference_is_spread(rewards):
    assert not uniform_groups(tensor(rewards), torch.zeros(2)).any()


def test_a_missing_value_changes_nothing_for_the_others():
    x, g = tensor([0.2, NAN, 0.9, 0.4]), torch.tensor([7, 7, 7, 1])
    rest = [0, 2, 3]
    for function in (group_sum, group_mean, group_std, leave_one_out_mean, uniform_groups):
        torch.testing.assert_close(function(x, g)[rest], function(x[rest], g[rest]))


def test_float32_stays_float32():
    x = torch.rand(4)
    for function in (group_sum, group_count, group_mean, group_std, leave_one_out_mean):
        assert function(x, torch.zeros(4)).dtype == torch.float32
