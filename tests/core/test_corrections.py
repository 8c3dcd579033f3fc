"""Weights for the engine's mismatch: the worked numbers of the tis-mis card."""

import pytest
import torch

from mmgrpo.core import corrections

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
MISMATCH = torch.tensor([[0.5, -0.2, 1.2, 0.0], [-3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)


def first_row(weight):
    return weight[0, :3].tolist()


def test_token_level():
    found = corrections.truncated(MISMATCH, MASK, cap=2.0)
    assert first_row(found) == pytest.approx([1.6487, 0.8187, 2.0], abs=5e-5)
    assert corrections.truncated(MISMATCH, MASK, floor=0.3)[1, 0] == 0.3
    found = corrections.masked(MISMATCH, MASK, low=0.5, high=2.0)
    assert first_row(found) == pytest.approx([1.6487, 0.8187, 0.0], abs=5e-5)
    assert found[1, 0] == 0


def test_sequence_level_is_the_product():
    assert first_row(corrections.truncated(MISMATCH, MASK, sequence=True)) == [2.0] * 3
    assert first_row(corrections.masked(MISMATCH, MASK, sequence=True)) == [0.0] * 3
    found = corrections.masked(MISMATCH, MASK, high=5.0, sequence=True)
    assert first_row(found) == pytest.approx([4.4817] * 3, abs=5e-5)


def test_geometric_rejection_looks_at_the_mean():
    found = corrections.geometric_rejection(MISMATCH, MASK, low=0.5, high=1.65)
    assert first_row(found) == [1] * 3  # exp(0.5) = 1.6487
    found = corrections.geometric_rejection(MISMATCH, MASK, low=0.5, high=1.64)
    assert first_row(found) == [0] * 3
    assert found[1, 0] == 0


@pytest.mark.parametrize(
    "correction",
    [
        corrections.none,
        corrections.truncated,
        corrections.masked,
        corrections.geometric_rejection,
    ],
)
def test_without_mismatch_every_weight_is_one_and_no_weight_has_a_gradient(correction):
    zero = torch.zeros_like(MISMATCH).requires_grad_()
    found = correction(zero, MASK)
    assert (found[MASK] == 1).all()
    assert not found.requires_grad
