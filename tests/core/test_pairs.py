"""Which samples are compared: against brute force, ties, holes, several rewards."""

import itertools
import math

import pytest
import torch

from mmgrpo.core import Trajectories, pairs


def batch(*groups, **rewards):
    """Groups of rewards, one decision per sample; ``rewards`` are named lists over all rows."""
    reward = torch.tensor([value for group in groups for value in group], dtype=torch.float64)
    named = {name: torch.tensor(values, dtype=torch.float64) for name, values in rewards.items()}
    return Trajectories(
        group=torch.tensor([5 - g for g, group in enumerate(groups) for _ in group]),
        mask=torch.ones(len(reward), 1, dtype=torch.bool),
        reward=reward,
        rewards=named or {"score": reward},
    )


def as_set(found):
    return {tuple(pair) for pair in found.tolist()}


def test_best_and_worst_of_each_group():
    found = pairs.best_worst(batch([0.2, 0.9, 0.1], [3.0, 1.0], [0.5, 0.5], [0.7]))
    assert as_set(found) == {(1, 2), (3, 4)}
    assert found.dtype == torch.int64


def test_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    rewards = [torch.rand(n, generator=generator).tolist() for n in (4, 7, 2)]
    t = batch(*rewards)
    gap = {}
    for w, r in itertools.permutations(range(13), 2):
        if t.group[w] == t.group[r]:
            gap[w, r] = float(t.reward[w] - t.reward[r])
    widest = {max((pair for pair in gap if t.group[pair[0]] == g), key=gap.get) for g in (5, 4, 3)}
    assert as_set(pairs.best_worst(t)) == widest


def test_top_and_bottom_never_share_a_sample_and_ties_have_no_pair():
    t = batch([0.9, 0.1, 0.5, 0.5, 0.8], [1.0, 1.0, 0.0, 1.0])
    assert as_set(pairs.top_bottom(t, count=2)) == {(0, 1), (4, 3), (5, 7)}
    assert as_set(pairs.top_bottom(t, count=9)) == {(0, 1), (4, 3), (5, 7)}
    with pytest.raises(ValueError, match="count must be at least 1"):
        pairs.top_bottom(t, count=0)


def test_float_noise_is_a_tie():
    t = batch([0.7, 0.7 + 1e-9, 0.7 - 1e-9])
    for choose in (pairs.best_worst, pairs.dominance):
        assert len(choose(t)) == 0


def test_rows_that_cannot_be_paired_are_passed_over():
    t = batch([math.nan, 0.3, 0.1, 0.2], [math.nan, 1.0])
    for choose in (pairs.best_worst, pairs.dominance):
        assert as_set(choose(t)) == {(1, 2)}


def test_dominance_leaves_out_what_cannot_be_compared():
    t = batch([3.0, 2.0], [1.0, 1.0], a=[2.0, 1.0, 1.0, 0.0], b=[1.0, 0.5, 0.0, 1.0])
    assert as_set(pairs.dominance(t)) == {(0, 1)}
    t = batch([3.0, 2.0], a=[2.0, 1.0], b=[1.0, 1.0])
    assert len(pairs.dominance(t)) == 0  # better in one reward, equal in the other


def test_dominance_on_one_reward_nests_the_ranks():
    t = batch([0.4, 0.1, 0.9, 0.6, 0.5])
    assert as_set(pairs.dominance(t)) == {(2, 1), (3, 0)}


def test_every_chosen_pair_dominates_and_no_free_pair_is_left():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 8, generator=generator).tolist()
    t = batch([x + y for x, y in zip(a, b, strict=True)], a=a, b=b)
    found = as_set(pairs.dominance(t))
    dominated = {(w, r) for w, r in itertools.permutations(range(8), 2)
                 if a[w] > a[r] and b[w] > b[r]}  # fmt: skip
    used = [row for pair in found for row in pair]
    assert found
    assert found <= dominated
    assert len(used) == len(set(used))
    assert not any(w not in used and r not in used for w, r in dominated)


def test_a_reward_that_does_not_apply_has_no_say():
    t = batch([3.0, 2.0], [1.0, 0.0], a=[2.0, 1.0, 1.0, math.nan], b=[math.nan, 5.0, math.nan, 1.0])
    assert as_set(pairs.dominance(t)) == {(0, 1)}


def test_given_pairs_stay_where_both_rows_do():
    t = batch([0.0, 0.0, 1.0, math.nan]).replace(pairs=torch.tensor([[1, 0], [2, 3], [0, 2]]))
    assert pairs.given(t).tolist() == [[1, 0], [0, 2]]
    with pytest.raises(ValueError, match="come with pairs"):
        pairs.given(batch([0.0, 1.0]))


def test_signs_and_the_decisions_that_are_compared():
    found = torch.tensor([[0, 1], [0, 2], [2, 3]])
    assert pairs.paired_signs(found, torch.zeros(5)).tolist() == [1, -1, 0, -1, 0]
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    by_decision = pairs.in_pairs(found, mask, by_decision=True)
    assert by_decision.tolist() == [
        [True, True, False], [False, True, False], [True, False, False], [True, False, False],
        [False] * 3,
    ]  # fmt: skip
    whole = pairs.in_pairs(found, mask, by_decision=False)
    assert torch.equal(whole[:4], mask[:4])
    assert not whole[4].any()
