"""KL estimators by enumeration of a small categorical distribution, and the drift."""

import math

import pytest
import torch

from mmgrpo.core.divergence import drift, k1, k2, k3, straight_through
from mmgrpo.core.ratios import LOG_RATIO_LIMIT

LOGITS = torch.tensor([0.3, -1.1, 0.8, 0.1], dtype=torch.float64)
OTHER = torch.tensor([0.1, 0.4, -0.6, 0.5], dtype=torch.float64).log_softmax(0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def reverse_kl(log_p):
    return (log_p.exp() * (log_p - OTHER)).sum()


def forward_kl(log_p):
    return (OTHER.exp() * (OTHER - log_p)).sum()


def gradient(function):
    """Gradient in the logits of ``function(log_p)``."""
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]


def expected(estimator, log_p):
    """Expectation over samples from the policy, the sampling held constant."""
    return (log_p.detach().exp() * estimator(log_p, OTHER)).sum()


def test_numbers_of_the_grpo_card():
    zero = tensor(0.0, 0.0)
    assert k3(tensor(0.2, -0.2), zero).tolist() == pytest.approx([0.0187, 0.0214], abs=5e-5)
    assert k2(tensor(0.2, -0.2), zero).tolist() == pytest.approx([0.02, 0.02])
    assert k1(tensor(0.2, -0.2), zero).tolist() == [0.2, -0.2]


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    log_p = LOGITS.log_softmax(0)
    exact = reverse_kl(log_p)
    torch.testing.assert_close(expected(k1, log_p), exact)
    torch.testing.assert_close(expected(k3, log_p), exact)
    assert abs(expected(k2, log_p) - exact) > 0.01


def test_gradients_as_losses():
    """k2: reverse KL's; k3: forward KL's; k1: zero."""
    found = {k: gradient(lambda log_p, k=k: expected(k, log_p)) for k in (k1, k2, k3)}
    torch.testing.assert_close(found[k2], gradient(reverse_kl))
    torch.testing.assert_close(found[k3], gradient(forward_kl))
    torch.testing.assert_close(found[k1], torch.zeros_like(LOGITS))


def test_k2_and_k3_are_never_negative_and_zero_where_equal():
    d = torch.arange(-30, 31, dtype=torch.float64) / 10
    zero = torch.zeros_like(d)
    for estimator in (k2, k3):
        value = estimator(d, zero)
        assert (value >= 0).all()
        assert value[30] == 0


def test_k3_keeps_its_digits_near_zero_and_stays_finite_far_out():
    assert k3(tensor(1e-9), tensor(0.0)).item() == pytest.approx(5e-19, rel=1e-3, abs=0)
    log_prob = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = k3(log_prob, torch.zeros(2))
    assert value.tolist() == pytest.approx(
        [math.exp(LOG_RATIO_LIMIT) - LOG_RATIO_LIMIT - 1, LOG_RATIO_LIMIT - 1], rel=1e-5
    )
    value.sum().backward()
    assert log_prob.grad.isfinite().all()


def test_straight_through_has_one_value_and_the_others_gradient():
    log_prob = tensor(0.2).requires_grad_()
    mixed = straight_through(k3(log_prob, tensor(0.0)), k2(log_prob, tensor(0.0)))
    assert mixed.item() == pytest.approx(0.0187, abs=5e-5)
    assert torch.autograd.grad(mixed.sum(), log_prob)[0].item() == pytest.approx(0.2)


def test_drift_coefficients_of_the_cpgd_card():
    log_ratio = tensor(0.5, -0.5, 3.0)
    log_prob = tensor(-1.0, -1.5, -2.0).requires_grad_()
    value = drift(log_prob, log_ratio, cap=2.0)
    (found,) = torch.autograd.grad(value.sum(), log_prob)
    assert found.tolist() == pytest.approx([0.6487, -0.3935, 2.0], abs=5e-5)


def test_drift_below_its_cap_has_the_gradient_of_k3_to_the_old_policy():
    old = tensor(-1.0, -0.2, -3.0)
    log_prob = tensor(-0.7, -0.9, -2.9).requires_grad_()
    (found,) = torch.autograd.grad(drift(log_prob, log_prob - old).sum(), log_prob)
    exact = torch.expm1(log_prob - old) - (log_prob - old)  # rho - 1 - log rho
    (wanted,) = torch.autograd.grad(exact.sum(), log_prob)
    torch.testing.assert_close(found, wanted)
