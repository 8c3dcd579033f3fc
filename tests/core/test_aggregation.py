"""Aggregation: the cards' worked numbers, denominators of the whole update, split invariance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo.core.aggregation import (
    Denominators,
    constant_norm,
    denominators,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)
from mmgrpo.core.collective import Collective, moments
from mmgrpo.core.trajectories import Trajectories

AGGREGATES = [sequence_mean_token_mean, token_mean, sequence_mean_token_sum, constant_norm]


def batch(lengths, width=None, **fields):
    lengths = torch.tensor(lengths)
    mask = torch.arange(int(width or lengths.max())) < lengths[:, None]
    return Trajectories(group=torch.zeros(len(lengths)), mask=mask, **fields)


def reduce(aggregate, loss, t, **options):
    loss = torch.tensor(loss, dtype=torch.float64)[:, None].expand(t.mask.shape)
    return aggregate(loss, t.decision_weight.double(), denominators(t), **options).item()


def test_numbers_of_the_dr_grpo_card():
    t = batch([2, 4], width=8)
    assert reduce(constant_norm, [1, 1], t) == 0.375
    assert reduce(constant_norm, [1, 1], batch([2, 4]), length=8) == 0.375
    assert reduce(sequence_mean_token_mean, [1, 1], t) == 1
    assert reduce(sequence_mean_token_sum, [1, 1], t) == 3


def test_numbers_of_the_dapo_card():
    t = batch([2, 6])
    assert reduce(token_mean, [1, 0], t) == 0.25
    assert reduce(sequence_mean_token_mean, [1, 0], t) == 0.5


def test_a_weighted_sample_has_its_weighted_mean():
    weight, loss = torch.tensor([[0.5, 0.5, 3.0]]), torch.tensor([[4.0, 8.0, 1.0]])
    total = Denominators(sequences=1, decisions=4)
    assert sequence_mean_token_mean(loss, weight, total).item() == 2.25
    assert token_mean(loss, weight, total).item() == 2.25
    assert sequence_mean_token_sum(loss, weight, total).item() == 9
    assert constant_norm(loss, weight, total, length=6).item() == 1.5


def test_an_empty_sample_counts_nowhere():
    for aggregate in AGGREGATES:
        options = {"length": 8} if aggregate is constant_norm else {}
        full, holed = batch([2, 4]), batch([2, 0, 4])
        assert reduce(aggregate, [1, 3], full, **options) == pytest.approx(
            reduce(aggregate, [1, 99, 3], holed, **options)
        )


def test_nothing_to_train_is_a_zero_with_a_gradient():
    t = batch([0, 0], width=3)
    for aggregate in AGGREGATES:
        loss = torch.ones(2, 3, requires_grad=True)
        value = aggregate(loss, t.decision_weight, denominators(t))
        value.backward()
        assert value.item() == 0
        assert loss.grad.tolist() == [[0] * 3] * 2


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_any_split_sums_to_the_whole(seed, parts):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    weight = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    t = Trajectories(group=torch.zeros(6), mask=mask, weight=weight)
    loss = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    total = denominators(t)
    order = torch.randperm(6, generator=generator)
    for aggregate in AGGREGATES:
        whole = aggregate(loss, t.decision_weight, total)
        shares = [
            aggregate(loss[rows], t.select(rows).decision_weight, total)
            for rows in order.tensor_split(parts)
        ]
        torch.testing.assert_close(sum(shares), whole)


def test_denominators_count_weights_not_places():
    t = batch([2, 3], weight=torch.tensor([[0.5, 1, 9], [0.5, 1, 1]]))
    assert denominators(t) == Denominators(sequences=2, decisions=4)


class Doubled(Collective):
    """Another rank with the same numbers."""

    size = 2

    def sum(self, value):
        return 2 * value


def test_denominators_and_moments_reach_over_ranks():
    assert denominators(batch([2, 4]), Doubled()) == Denominators(sequences=4, decisions=12)
    x, w = torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0])
    count, mean, squares = moments(x, w, Doubled())
    assert (count.item(), mean.item(), squares.item()) == (8, 4, 2 * (9 + 3))
