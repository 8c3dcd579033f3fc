"""Step divergences against torch.distributions, worked numbers and the closed forms (float64)."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from mmgrpo.core.diffusion import DIVERGENCES, step_divergence, transition

EXACT = 1e-12


def f64(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "value", "tolerance"),
    [
        ("exact", 1.5817e-5, 1e-9),
        ("code", 1.5817e-6, 1e-10),
        ("velocity", 4e-4, EXACT),
        ("mean", 0.00249**2, EXACT),
    ],
)
def test_worked_replay(kind, value, tolerance):
    found = step_divergence(
        kind, f64(-0.28), f64(-0.3), 0.8, 0.7, kernel="flow_sde", eta=0.7, sigma_max=0.96
    )
    assert found.item() == pytest.approx(value, abs=tolerance)


def test_worked_first_step():
    """At sigma = 1 the value comes from 1 - sigmas[1], where the general shortcut would give 0."""
    cap = 27 / 28
    found = step_divergence(
        "exact", f64(0.42), f64(0.4), 1.0, cap, kernel="flow_sde", eta=0.7, sigma_max=cap
    )
    assert found.item() == pytest.approx(5.2062e-7, abs=1e-11)
    assert found.item() == pytest.approx((1 - cap) ** 2 / (2 * 0.7**2) * 0.02**2, rel=1e-9)


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "sde_dpmpp"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_exact_is_the_kl_of_the_two_normals(kernel, reduce):
    v, other, x = draw(3, 2, 5), draw(3, 2, 5, seed=1), draw(3, 2, 5, seed=2)
    sigma = torch.tensor([1.0, 0.8, 0.4], dtype=torch.float64)
    at = {"eta": 0.6, "sigma_max": 0.93}
    mean, std = transition(kernel, v, x, sigma, sigma - 0.1, **at)
    mean_other, _ = transition(kernel, other, x, sigma, sigma - 0.1, **at)
    std = std.view(3, 1, 1)
    oracle = kl_divergence(Normal(mean, std), Normal(mean_other, std)).flatten(1)
    oracle = oracle.mean(1) if reduce == "mean" else oracle.sum(1)
    found = step_divergence(
        "exact", v, other, sigma, sigma - 0.1, kernel=kernel, reduce=reduce, **at
    )
    torch.testing.assert_close(found, oracle, rtol=1e-12, atol=0)
    gap = step_divergence("mean", v, other, sigma, sigma - 0.1, kernel=kernel, reduce=reduce, **at)
    squares = ((mean - mean_other) ** 2).flatten(1)
    torch.testing.assert_close(
        gap, squares.mean(1) if reduce == "mean" else squares.sum(1), rtol=1e-12, atol=0
    )


def test_code_divides_by_the_diffusion_without_the_step():
    v, other = draw(2, 5), draw(2, 5, seed=1)
    at = {"kernel": "dance_sde", "eta": 0.3, "sigma_max": 1.0}
    mean = step_divergence("mean", v, other, 0.8, 0.7, **at)
    code = step_divergence("code", v, other, 0.8, 0.7, **at)
    torch.testing.assert_close(code, mean / (2 * 0.3**2), rtol=1e-12, atol=0)


def test_gradient_reaches_the_policy_and_is_right():
    other = draw(2, 5, seed=1)
    for kind in DIVERGENCES:

        def value(v, kind=kind):
            return step_divergence(
                kind, v, other, 0.8, 0.7, kernel="flow_sde", eta=0.7, sigma_max=0.96
            )

        assert torch.autograd.gradcheck(value, draw(2, 5).requires_grad_())


def test_steps_without_noise_and_equal_velocities_are_zero_and_finite():
    v, other = draw(2, 5).requires_grad_(), draw(2, 5, seed=1)
    to = torch.tensor([0.7, 0.0], dtype=torch.float64)
    found = step_divergence("exact", v, other, 0.8, to, kernel="cps", eta=0.8, sigma_max=0.9)
    assert found[0] > 0
    assert found[1] == 0
    (gradient,) = torch.autograd.grad(found.sum(), v)
    assert gradient.isfinite().all()
    assert step_divergence("exact", v, v, 0.8, 0.7, kernel="cps", eta=0.8, sigma_max=0.9).sum() == 0


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"unknown divergence 'kl'.*exact"):
        step_divergence("kl", f64(0), f64(0), 0.8, 0.7, kernel="ode", eta=0, sigma_max=1)
