"""Filters against transformers' own, inverse-CDF sampling against loops and counts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgrpo.rollout.sampling import draw_uniforms, filter_logits, sample_inverse_cdf


def logits(rows=6, vocabulary=40, scale=3.0):
    return scale * torch.randn(rows, vocabulary)


def warp(warper, values):
    return warper(None, values)


@pytest.mark.parametrize("top_k", [1, 3, 40, 100])
def test_top_k_agrees_with_transformers(top_k):
    from transformers import TopKLogitsWarper

    values = logits()
    torch.testing.assert_close(
        filter_logits(values, top_k=top_k), warp(TopKLogitsWarper(top_k), values)
    )


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_agrees_with_transformers(top_p):
    from transformers import TopPLogitsWarper

    values = logits()
    torch.testing.assert_close(
        filter_logits(values, top_p=top_p), warp(TopPLogitsWarper(top_p), values)
    )


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9])
def test_min_p_agrees_with_transformers(min_p):
    from transformers import MinPLogitsWarper

    values = logits()
    torch.testing.assert_close(
        filter_logits(values, min_p=min_p), warp(MinPLogitsWarper(min_p), values)
    )


def test_filters_apply_one_after_another_to_scaled_logits():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    values = logits()
    expected = values / 0.7
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        expected = warp(warper, expected)
    found = filter_logits(values, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)
    torch.testing.assert_close(found, expected)


def test_the_nucleus_by_hand():
    values = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    kept = filter_logits(values, top_p=0.74).isfinite()
    assert kept.tolist() == [[False, True, True, False]]  # 0.5 + 0.25 reaches 0.74
    kept = filter_logits(values, top_p=0.76).isfinite()
    assert kept.tolist() == [[False, True, True, True]]


def test_ties_never_keep_more_than_k():
    assert filter_logits(torch.zeros(1, 5), top_k=2).isfinite().sum() == 2


def test_temperature_zero_keeps_the_likeliest_token_only():
    values = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert filter_logits(values, temperature=0).softmax(-1).tolist() == [[0, 1, 0, 0]]


def test_a_small_temperature_tends_to_it():
    values = logits()
    torch.testing.assert_close(
        filter_logits(values, temperature=1e-4).softmax(-1),
        filter_logits(values, temperature=0).softmax(-1),
    )


def test_filters_off_change_nothing():
    values = logits()
    assert torch.equal(filter_logits(values), values)


def sample_by_loop(weights, uniform):
    """The definition, in exact order and without vectors."""
    total, reached = math.fsum(weights), 0.0
    last = max(i for i, w in enumerate(weights) if w > 0)
    for index, weight in enumerate(weights):
        reached += weight
        if weight > 0 and (reached > uniform * total or index == last):
            return index
    raise AssertionError


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 0.125, 0.5, 1.0, 3.0]), min_size=1, max_size=9),
    uniform=st.sampled_from([0.0, 1e-300, 0.25, 0.5, 0.75, 1 - 2**-53, 1.0]),
)
def test_sampling_agrees_with_a_loop_also_on_plateaus_and_at_the_ends(weights, uniform):
    if not any(weights):
        weights[0] = 1.0
    found = sample_inverse_cdf(
        torch.tensor([weights], dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64)
    )
    assert found.tolist() == [sample_by_loop(weights, uniform)]
    assert weights[found] > 0


def test_a_token_of_probability_zero_is_never_drawn():
    weights = torch.rand(64, 300, dtype=torch.float64) * (torch.rand(64, 300) < 0.1)
    weights[:, 150] = 1e-300
    for uniform in (0.0, 5e-324, 0.5, 1 - 2**-53, 1.0):
        found = sample_inverse_cdf(weights, torch.full((64,), uniform, dtype=torch.float64))
        assert (weights.gather(1, found[:, None]) > 0).all()


def test_not_even_where_a_parallel_sum_is_not_monotonic(monkeypatch):
    """On a GPU, the running sum of a plateau may wobble in its last digits."""
    exact = torch.Tensor.cumsum
    wobble = 1e-12 * torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    uneven = lambda self, **options: exact(self, **options) + wobble  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "cumsum", uneven)
    monkeypatch.setattr("mmgrpo.rollout.sampling.IN_ORDER", ())
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.5, 0.0]], dtype=torch.float64)
    for uniform in (0.0, 0.5, 1.0):
        found = sample_inverse_cdf(weights, torch.tensor([uniform], dtype=torch.float64))
        assert int(found) in (1, 4)


@pytest.mark.parametrize("size", [513, 768, 1000, 4096])
def test_a_large_vocabulary_is_searched_in_blocks_with_the_same_result(size):
    torch.manual_seed(size)
    weights = (torch.randint(0, 5, (40, size)) * (torch.rand(40, size) < 0.02)).double()
    weights[:, 300] = 1.0
    weights[7, :] = 0.0
    weights[7, size - 1] = 1.0
    weights[8, 256:] = 0.0
    for uniform in (0.0, 0.25, 0.37, 0.5, 1 - 2**-53, 1.0):
        found = sample_inverse_cdf(weights, torch.full((40,), uniform, dtype=torch.float64))
        assert found.tolist() == [sample_by_loop(row, uniform) for row in weights.tolist()]


def test_float32_blocks_draw_each_token_by_its_share():
    torch.manual_seed(0)
    probs = torch.randn(5000).mul(2).softmax(-1)
    uniforms = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    found = torch.cat(
        [sample_inverse_cdf(probs.expand(500, -1), part) for part in uniforms.split(500)]
    )
    counts = torch.bincount(found, minlength=5000)
    assert (counts - 20000 * probs.double()).abs().max() <= 1.01


def test_the_end_of_a_block_never_gives_a_token_of_weight_zero():
    """A block's float32 sum may be larger than the float64 sum of its weights, by rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(64, 1024)
    weights[:, :100] = torch.rand(64, 100, generator=generator)
    weights[:, 300] = 1.0
    ends = weights[:, :256].sum(dim=-1).double()
    assert (ends > weights[:, :256].double().sum(dim=-1)).any()
    uniforms = ends / (ends + 1.0) * (1 - 1e-13)
    found = sample_inverse_cdf(weights, uniforms)
    assert (weights.gather(1, found[:, None]) > 0).all()


def test_evenly_spaced_uniforms_draw_each_token_by_its_share():
    probs = torch.tensor([0.1, 0.0, 0.35, 0.05, 0.5], dtype=torch.float64)
    count = 2000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = sample_inverse_cdf(probs.expand(count, -1), uniforms)
    assert torch.bincount(found, minlength=5).tolist() == [200, 0, 700, 100, 1000]


def test_weights_need_not_be_normalised():
    weights, uniforms = torch.rand(50, 20), torch.rand(50, dtype=torch.float64)
    assert torch.equal(
        sample_inverse_cdf(weights, uniforms), sample_inverse_cdf(weights * 7.5, uniforms)
    )


def test_a_stream_depends_on_its_name_alone():
    all_rows = draw_uniforms(5, [(10, 0), (10, 1), (3, 0)], 12)
    assert torch.equal(draw_uniforms(5, [(3, 0), (10, 1)], 12), all_rows[[2, 1]])
    torch.testing.assert_close(draw_uniforms(5, [(10, 1)], 4)[0], all_rows[1, :4])
    assert len(torch.unique(all_rows)) == all_rows.numel()
    assert not torch.equal(draw_uniforms(6, [(3, 0)], 12), all_rows[2:])
    assert not torch.equal(draw_uniforms(5, [(0, 3)], 12), all_rows[2:])
    assert ((all_rows >= 0) & (all_rows < 1)).all()
    assert all_rows.dtype == torch.float64
