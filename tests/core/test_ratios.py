"""Importance ratios at token, segment and sequence level."""

import math

import pytest
import torch

from mmgrpo.core.ratios import (
    LOG_RATIO_LIMIT,
    log_ratio,
    segment,
    segment_reduce,
    sequence,
    token,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
SPANS = torch.tensor([[0, 0, 1, 1], [2, 2, 0, 0], [0, 0, 0, 0]])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_log_ratio():
    return torch.randn(MASK.shape, dtype=torch.float64) * MASK


def test_sequence_ratio_of_the_gspo_card():
    mask = torch.ones(1, 3).bool()
    found = sequence(tensor([[0.1, 0.6, -0.2]]), mask).exp()
    assert found.flatten().tolist() == pytest.approx([1.1814] * 3, abs=5e-5)
    product = sequence(tensor([[0.5, -0.2, 1.2]]), mask, product=True).exp()
    assert product.flatten().tolist() == pytest.approx([4.4817] * 3, abs=5e-5)


@pytest.mark.parametrize("product", [False, True])
def test_segment_ratio_against_loops(product):
    x = random_log_ratio()
    found = segment(x, MASK, SPANS, product=product)
    for i in range(3):
        for t in range(4):
            mine = [x[i, u].item() for u in range(4) if MASK[i, u] and SPANS[i, u] == SPANS[i, t]]
            value = sum(mine) if product or not mine else sum(mine) / len(mine)
            assert found[i, t].item() == pytest.approx(value if MASK[i, t] else 0, abs=1e-12)


@pytest.mark.parametrize("product", [False, True])
def test_a_segment_per_decision_is_token_level_and_one_per_sample_sequence_level(product):
    x = random_log_ratio()
    each = torch.arange(4).expand(3, 4)
    torch.testing.assert_close(segment(x, MASK, each, product=product), token(x, MASK))
    whole = torch.zeros_like(SPANS)
    torch.testing.assert_close(
        segment(x, MASK, whole, product=product), sequence(x, MASK, product=product)
    )


def test_segment_level_without_segments_says_so():
    with pytest.raises(ValueError, match=r"trajectories\.segment"):
        segment(random_log_ratio(), MASK)


def test_padding_does_not_enter_a_mean():
    wide = torch.cat([random_log_ratio(), torch.zeros(3, 5, dtype=torch.float64)], dim=1)
    mask = torch.cat([MASK, torch.zeros(3, 5).bool()], dim=1)
    torch.testing.assert_close(sequence(wide, mask)[:, :4], sequence(wide[:, :4], MASK))


def test_the_token_form_has_the_sequence_value_and_its_own_gradient():
    x = random_log_ratio().requires_grad_()
    plain, through = sequence(x, MASK), sequence(x, MASK, straight_through=True)
    torch.testing.assert_close(plain, through)
    (gradient,) = torch.autograd.grad(through.exp().sum(), x)
    torch.testing.assert_close(gradient, plain.exp().detach() * MASK)


def test_sums_and_means_over_an_empty_row_are_zero():
    x = random_log_ratio()
    for mean in (True, False):
        assert segment_reduce(x, MASK, SPANS, mean=mean)[2].tolist() == [0] * 4


def test_the_log_ratio_is_zero_off_the_mask_whatever_lies_there():
    garbage = tensor([math.nan, math.inf, -math.inf, 3])
    log_prob = torch.where(MASK, tensor(-1.0), garbage).requires_grad_()
    found = log_ratio(log_prob, torch.where(MASK, tensor(-1.5), garbage.flip(0)), MASK)
    assert torch.equal(found, torch.where(MASK, tensor(0.5), tensor(0.0)))
    found.sum().backward()
    assert torch.equal(log_prob.grad, MASK.double())


def test_extreme_log_ratios_are_clamped_at_every_level():
    mask = torch.ones(1, 4).bool()
    log_prob = tensor([[1e4, -1e4, 15.0, 15.0]])
    x = log_ratio(log_prob, torch.zeros_like(log_prob), mask)
    assert x.tolist() == [[LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, 15, 15]]
    whole = torch.zeros(1, 4, dtype=torch.int64)
    for level in (
        sequence(x, mask, product=True),
        segment(x, mask, whole, product=True),
    ):
        assert level.tolist() == [[LOG_RATIO_LIMIT] * 4]
        assert level.float().exp().isfinite().all()


def test_without_decisions_there_is_nothing_to_reduce():
    empty = torch.zeros(2, 0)
    assert segment_reduce(empty, empty.bool(), empty.long(), mean=True).shape == (2, 0)
