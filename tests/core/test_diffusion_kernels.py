"""Step kernels: worked numbers, identities, convergence, density and gradients (float64)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from mmgrpo.core.diffusion import (
    DIFFUSION,
    FLOW,
    KERNELS,
    ddim_eta,
    dpmpp_2m,
    gaussian_log_prob,
    linear_shift,
    sd3_shift,
    step,
    transition,
)

NUMBERS = 1e-6  # the worked numbers are given to six decimals
EXACT = 1e-12  # float64 round-off
STOCHASTIC = ["flow_sde", "dance_sde", "cps", "cps_density", "sde_dpmpp"]


def f64(*values: float) -> torch.Tensor:
    """``[1, D]`` float64."""
    return torch.tensor([values], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def take(kind: str, *, v: float, x: float, sigma: float, to: float, eta: float, z: float, cap=1.0):
    return step(kind, f64(v), f64(x), sigma, to, eta=eta, sigma_max=cap, noise=f64(z))


CASE = {"v": -0.3, "x": 0.5, "sigma": 0.8, "to": 0.7, "z": 1.2}


@pytest.mark.parametrize(
    ("kind", "eta", "mean", "std", "x_next", "log_prob"),
    [
        ("flow_sde", 0.7, 0.476100, 0.442719, 1.007363, -0.824118),
        ("dance_sde", 0.3, 0.527525, 0.094868, 0.641367, 0.716327),
        ("cps", 0.8, 0.317177, 0.665740, 1.116065, -0.638221),
        ("cps_density", 0.8, 0.317177, 0.665740, 1.116065, -1.232082),
    ],
)
def test_worked_step(kind, eta, mean, std, x_next, log_prob):
    out = take(kind, eta=eta, **CASE)
    assert out.mean.item() == pytest.approx(mean, abs=NUMBERS)
    assert out.std.item() == pytest.approx(std, abs=NUMBERS)
    assert out.x_next.item() == pytest.approx(x_next, abs=NUMBERS)
    assert out.log_prob.item() == pytest.approx(log_prob, abs=NUMBERS)


@pytest.mark.parametrize(
    ("cap", "mean", "x_next", "log_prob"),
    [(27 / 28, 0.816214, 0.466214, -0.687264), (0.96012931, 0.814552, 0.464552, None)],
)
def test_worked_first_step_takes_the_second_sigma_for_one(cap, mean, x_next, log_prob):
    out = take("flow_sde", v=0.4, x=1.1, sigma=1.0, to=cap, eta=0.7, z=-0.5, cap=cap)
    assert out.mean.item() == pytest.approx(mean, abs=NUMBERS)
    assert out.std.item() == pytest.approx(0.7, abs=EXACT)
    assert out.x_next.item() == pytest.approx(x_next, abs=NUMBERS)
    if log_prob is not None:
        assert out.log_prob.item() == pytest.approx(log_prob, abs=NUMBERS)


def test_a_first_sigma_rounded_just_below_one_counts_as_one():
    below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    out = take("flow_sde", v=0.4, x=1.1, sigma=below, to=27 / 28, eta=0.7, z=-0.5, cap=27 / 28)
    assert out.std.item() == pytest.approx(0.7, abs=1e-5)


def test_worked_replay_with_a_moved_velocity():
    old = take("flow_sde", eta=0.7, **CASE)
    new = step(
        "flow_sde", f64(-0.28), f64(0.5), 0.8, 0.7, eta=0.7, sigma_max=0.96, x_next=old.x_next
    )
    assert new.mean.item() == pytest.approx(0.473610, abs=NUMBERS)
    gap = (new.log_prob - old.log_prob).item()
    assert gap == pytest.approx(-0.006765, abs=NUMBERS)
    assert math.exp(gap) == pytest.approx(0.993258, abs=NUMBERS)


def test_worked_mean_against_sum_over_elements():
    v, x, z = f64(-0.3, -0.3, -0.3, -0.3), f64(0.5, 0.5, 0.5, 0.5), f64(1.2, -0.7, 0.1, 0.4)
    ratios = {}
    for reduce in ("mean", "sum"):
        at = {"eta": 0.7, "sigma_max": 0.96, "reduce": reduce}
        old = step("flow_sde", v, x, 0.8, 0.7, noise=z, **at)
        new = step("flow_sde", v + 0.02, x, 0.8, 0.7, x_next=old.x_next, **at)
        ratios[reduce] = (new.log_prob - old.log_prob).exp().item()
        if reduce == "mean":
            assert old.log_prob.item() == pytest.approx(-0.366618, abs=NUMBERS)
            assert new.log_prob.item() == pytest.approx(-0.368040, abs=NUMBERS)
    assert ratios["mean"] == pytest.approx(0.998579, abs=NUMBERS)
    assert ratios["sum"] == pytest.approx(0.994329, abs=NUMBERS)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "sde_dpmpp"])
@pytest.mark.parametrize(("sigma", "to"), [(1.0, 0.9), (0.8, 0.7), (0.25, 0.0)])
def test_without_noise_every_kernel_is_the_ode(kind, sigma, to):
    v, x = draw(3, 4, 2), draw(3, 4, 2, seed=1)
    euler = step("ode", v, x, sigma, to, eta=0.0, sigma_max=0.9)
    out = step(kind, v, x, sigma, to, eta=0.0, sigma_max=0.9)
    torch.testing.assert_close(out.x_next, euler.x_next, rtol=0, atol=EXACT)
    torch.testing.assert_close(euler.x_next, x + v * (to - sigma), rtol=0, atol=EXACT)
    assert torch.equal(out.std, torch.zeros(()).double())
    assert torch.equal(out.log_prob, torch.zeros(3).double())


def test_flow_sde_is_the_constant_sde_with_its_own_diffusion():
    v, x = draw(5, 7), draw(5, 7, seed=1)
    sigma = torch.tensor([0.95, 0.8, 0.5, 0.3, 0.1], dtype=torch.float64)
    g = 0.7 * (sigma / (1 - sigma)).sqrt()
    ours = transition("flow_sde", v, x, sigma, sigma - 0.05, eta=0.7, sigma_max=0.97)
    theirs = transition("dance_sde", v, x, sigma, sigma - 0.05, eta=g, sigma_max=0.97)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=EXACT)


def test_velocity_form_equals_score_form():
    v, x = draw(2, 6), draw(2, 6, seed=1)
    sigma, to, g = 0.6, 0.45, 0.9
    x0 = x - sigma * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    expected = x + v * (to - sigma) - 0.5 * g**2 * score * (to - sigma)
    mean, std = transition("dance_sde", v, x, sigma, to, eta=g, sigma_max=1.0)
    torch.testing.assert_close(mean, expected, rtol=0, atol=EXACT)
    assert std.item() == pytest.approx(g * math.sqrt(sigma - to), abs=EXACT)


def _after_one_step(kind: str, eta: float) -> tuple[float, float]:
    """Coefficient of x0 and total noise variance after a step with the conditional velocity."""
    sigma, to = 0.8, 0.7

    def mean(x0: float, e: float) -> float:
        v, x = f64(e - x0), f64((1 - sigma) * x0 + sigma * e)
        return transition(kind, v, x, sigma, to, eta=eta, sigma_max=1.0)[0].item()

    std = transition(kind, f64(0), f64(0), sigma, to, eta=eta, sigma_max=1.0)[1].item()
    return mean(1, 0), mean(0, 1) ** 2 + std**2


def test_one_step_keeps_the_signal_and_cps_keeps_the_noise_level():
    signal, variance = _after_one_step("flow_sde", 0.7)
    assert signal == pytest.approx(0.3, abs=EXACT)
    assert math.sqrt(variance) == pytest.approx(0.727672, abs=NUMBERS)
    signal, variance = _after_one_step("cps", 0.8)
    assert signal == pytest.approx(0.3, abs=EXACT)
    assert math.sqrt(variance) == pytest.approx(0.7, abs=EXACT)


def test_small_cps_agrees_with_the_sde_of_the_same_std_to_first_order():
    v, x, sigma, g = draw(1, 9), draw(1, 9, seed=1), 0.6, 0.5
    errors = []
    for dt in (0.02, 0.01):
        to = sigma - dt
        share = math.asin(g * math.sqrt(dt) / to) / (math.pi / 2)
        a = transition("cps", v, x, sigma, to, eta=share, sigma_max=1.0)[0]
        b = transition("dance_sde", v, x, sigma, to, eta=g, sigma_max=1.0)[0]
        errors.append((a - b).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # second order in dt per step


MEAN, VARIANCE = 0.7, 0.25  # of the Gaussian data of the convergence test


def _affine_velocity(sigma: float) -> tuple[float, float]:
    """Exact marginal velocity of Gaussian data, as slope and intercept in x."""
    total = (1 - sigma) ** 2 * VARIANCE + sigma**2
    gain = (1 - sigma) * VARIANCE / total
    intercept = MEAN - gain * (1 - sigma) * MEAN
    return (1 - gain) / sigma, -intercept / sigma


def _propagate(kind: str, eta: float, steps: int, last: str) -> tuple[float, float]:
    sigmas = linear_shift(steps).double()
    mean, variance = 0.0, 1.0
    for index in range(steps):
        sigma, to = sigmas[index].item(), sigmas[index + 1].item()
        slope, intercept = _affine_velocity(sigma)
        use = last if index == steps - 1 else kind
        at = {"eta": eta, "sigma_max": sigmas[1].item()}
        images = [
            transition(use, f64(slope * x + intercept), f64(x), sigma, to, **at) for x in (0.0, 1.0)
        ]
        offset = images[0][0].item()
        gain = images[1][0].item() - offset
        mean, variance = gain * mean + offset, gain**2 * variance + images[0][1].item() ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(
    ("kind", "eta", "last", "stds"),
    [
        ("ode", 0.0, "ode", (0.3697, 0.4647, 0.4910)),
        ("flow_sde", 0.7, "ode", (0.4188, 0.4793, 0.4955)),
        ("dance_sde", 0.3, "dance_sde", (0.3852, 0.4686, 0.4919)),
        ("sde_dpmpp", 1.0, "sde_dpmpp", (0.3301, 0.4312, 0.4782)),
        ("cps", 0.8, "cps", (0.3146, 0.3711, 0.3918)),
    ],
)
def test_gaussian_data_come_out_with_the_known_mean_and_std(kind, eta, last, stds):
    for steps, expected in zip((10, 40, 160), stds, strict=True):
        mean, std = _propagate(kind, eta, steps, last)
        assert mean == pytest.approx(MEAN, abs=1e-5)  # the schedule is float32
        assert std == pytest.approx(expected, abs=6e-5)


def _second_order_std(steps: int) -> float:
    """Std of the final sample; the map is affine, so two samples tell it."""
    ends = []
    for start in (0.0, 1.0):
        sigmas = linear_shift(steps).double()
        x, previous = f64(start), None
        for index in range(steps):
            sigma = sigmas[index].item()
            slope, intercept = _affine_velocity(sigma)
            x0 = x - sigma * (slope * x + intercept)
            x = dpmpp_2m(x0, x, sigma, sigmas[index + 1].item(), previous=previous)
            previous = (x0, sigma)
        ends.append(x.item())
    return ends[1] - ends[0]


def test_second_order_solver_converges_to_the_data():
    for steps, expected in ((10, 0.4068), (40, 0.5042), (160, 0.5013)):
        assert _second_order_std(steps) == pytest.approx(expected, abs=6e-5)


def test_worked_second_order_step():
    at = {"x0": f64(0.74), "x": f64(0.5), "sigma": 0.8, "sigma_next": 0.7}
    euler = step("ode", f64((0.5 - 0.74) / 0.8), f64(0.5), 0.8, 0.7, eta=0, sigma_max=1).x_next
    assert dpmpp_2m(**at).item() == pytest.approx(0.53, abs=EXACT)
    assert euler.item() == pytest.approx(0.53, abs=EXACT)
    second = dpmpp_2m(**at, previous=(f64(0.70), 0.9))
    assert second.item() == pytest.approx(0.531662, abs=NUMBERS)


def test_heun_form_by_its_formula_and_infinite_history_is_first_order():
    h, h0 = math.log(0.3 * 0.8 / (0.7 * 0.2)), math.log(0.2 * 0.9 / (0.8 * 0.1))
    slope = (0.74 - 0.70) * h / h0
    expected = 0.53 + 0.3 * ((math.exp(-h) - 1) / h + 1) * slope
    at = {"x0": f64(0.74), "x": f64(0.5), "sigma": 0.8}
    heun = dpmpp_2m(**at, sigma_next=0.7, previous=(f64(0.70), 0.9), heun=True)
    assert heun.item() == pytest.approx(expected, abs=EXACT)
    assert dpmpp_2m(**at, sigma_next=0.7, previous=(f64(0.1), 1.0)).item() == pytest.approx(0.53)
    assert dpmpp_2m(**at, sigma_next=0.0, previous=(f64(0.1), 0.9)).item() == pytest.approx(0.74)


def test_worked_ddim_step_and_its_deterministic_limit():
    out = ddim_eta(f64(0.3), f64(0.4), 0.5, 0.7, eta=1.0, noise=f64(1.0))
    assert out.std.item() == pytest.approx(0.414039, abs=NUMBERS)
    assert out.mean.item() == pytest.approx(0.329859, abs=NUMBERS)
    assert out.x_next.item() == pytest.approx(0.743898, abs=NUMBERS)
    assert out.log_prob.item() == pytest.approx(-0.537144, abs=NUMBERS)
    x0 = (0.4 - math.sqrt(0.5) * 0.3) / math.sqrt(0.5)
    still = ddim_eta(f64(0.3), f64(0.4), 0.5, 0.7, eta=0.0)
    assert still.x_next.item() == pytest.approx(math.sqrt(0.7) * x0 + math.sqrt(0.3) * 0.3)
    assert still.log_prob.item() == 0.0


def test_ddim_with_full_noise_has_the_ddpm_posterior_std():
    before, after = 0.42, 0.55
    alpha = before / after
    posterior = math.sqrt((1 - after) / (1 - before) * (1 - alpha))
    out = ddim_eta(f64(0.1), f64(0.2), before, after, eta=1.0, noise=f64(0.0))
    assert out.std.item() == pytest.approx(posterior, abs=EXACT)


def test_the_ddim_kernel_is_the_worked_step_by_noise_levels():
    at = {"sigma_max": 1.0, "eta": 1.0}
    levels = (math.sqrt(1 - 0.5), math.sqrt(1 - 0.7))
    out = step("ddim_eta", f64(0.3), f64(0.4), *levels, noise=f64(1.0), **at)
    assert out.std.item() == pytest.approx(0.414039, abs=NUMBERS)
    assert out.mean.item() == pytest.approx(0.329859, abs=NUMBERS)
    assert out.x_next.item() == pytest.approx(0.743898, abs=NUMBERS)
    assert out.log_prob.item() == pytest.approx(-0.537144, abs=NUMBERS)


def test_ddim_without_noise_moves_between_the_two_predicted_ends():
    epsilon, x = draw(3, 5), draw(3, 5, seed=1)
    for sigma, to in ((0.99, 0.7), (0.6, 0.2), (0.3, 0.0)):
        x0 = (x - sigma * epsilon) / math.sqrt(1 - sigma**2)
        expected = math.sqrt(1 - to**2) * x0 + to * epsilon
        for kind, eta in (("ddim", 0.8), ("ddim_eta", 0.0)):
            out = step(kind, epsilon, x, sigma, to, eta=eta, sigma_max=1.0)
            torch.testing.assert_close(out.x_next, expected, rtol=0, atol=1e-12)
            assert (out.log_prob == 0).all()
    final = step("ddim_eta", epsilon, x, 0.3, 0.0, eta=1.0, sigma_max=1.0, noise=draw(3, 5, seed=2))
    torch.testing.assert_close(final.x_next, x0, rtol=0, atol=1e-12)  # no noise to sigma = 0
    assert final.std.item() == 0


def test_any_eta_keeps_the_noise_level_of_the_exact_process():
    """With the true noise, what is left of x0 and the total noise are those of the next level."""
    x0, noise = draw(1, 4), draw(1, 4, seed=1)
    sigma, to = 0.8, 0.5
    x = math.sqrt(1 - sigma**2) * x0 + sigma * noise
    for eta in (0.3, 1.0):
        mean, std = transition("ddim_eta", noise, x, sigma, to, eta=eta, sigma_max=1.0)
        rest = (mean - math.sqrt(1 - to**2) * x0) / noise
        torch.testing.assert_close(rest**2 + std**2, torch.full_like(rest, to**2))


def test_processes_name_their_kernels():
    assert FLOW.kernel("auto") == "flow_sde"
    assert FLOW.kernel("ode") == "ode"
    assert DIFFUSION.kernel("auto") == "ddim_eta"
    assert DIFFUSION.kernel("ode") == "ddim"
    assert {*FLOW.kernels, *DIFFUSION.kernels} == set(KERNELS)
    assert not {*FLOW.kernels} & {*DIFFUSION.kernels}
    for process, name in ((FLOW, "ddim"), (FLOW, "ddim_eta"), (DIFFUSION, "cps")):
        with pytest.raises(ValueError, match=f"'{name}' does not fit {process.name}; valid: auto"):
            process.kernel(name)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps_density", "sde_dpmpp"])
def test_log_prob_is_the_normal_density_of_the_sample(kind):
    v, x, z = draw(4, 3, 2), draw(4, 3, 2, seed=1), draw(4, 3, 2, seed=2)
    sigma = torch.tensor([1.0, 0.9, 0.6, 0.3], dtype=torch.float64)
    out = step(kind, v, x, sigma, sigma - 0.1, eta=0.6, sigma_max=0.95, noise=z)
    std = out.std.view(4, 1, 1)
    normal = Normal(out.mean, std.expand_as(out.mean))
    expected = normal.log_prob(out.mean + std * z)
    torch.testing.assert_close(out.log_prob, expected.mean(dim=(1, 2)), rtol=0, atol=EXACT)
    torch.testing.assert_close(out.x_next, out.mean + std * z, rtol=0, atol=EXACT)
    total = step(kind, v, x, sigma, sigma - 0.1, eta=0.6, sigma_max=0.95, noise=z, reduce="sum")
    torch.testing.assert_close(total.log_prob, expected.sum(dim=(1, 2)), rtol=0, atol=1e-10)


def test_sampled_steps_have_the_stated_mean_and_std():
    count = 200_000
    x, v, z = torch.full((count, 1), 0.5), torch.full((count, 1), -0.3), draw(count, 1).float()
    out = step("flow_sde", v, x, 0.8, 0.7, eta=0.7, sigma_max=0.96, noise=z)
    sigma_of_mean = 0.442719 / math.sqrt(count)
    assert out.x_next.mean().item() == pytest.approx(0.4761, abs=4 * sigma_of_mean)
    assert out.x_next.std().item() == pytest.approx(0.442719, abs=4 * sigma_of_mean)


@pytest.mark.parametrize(
    ("kind", "sigma", "expected"),
    [
        ("ode", 0.8, -0.1),
        ("flow_sde", 0.8, -0.1 * (1 + 0.7**2 / 2)),
        ("flow_sde", 1.0, -0.1),
        ("dance_sde", 0.8, -0.1 * (1 + 0.7**2 * 0.2 / 1.6)),
        ("cps", 0.8, -0.8 * 0.3 + 0.2 * 0.7 * math.cos(0.7 * math.pi / 2)),
    ],
)
def test_derivative_of_the_mean_by_autograd(kind, sigma, expected):
    v = f64(-0.3).requires_grad_()
    out = step(kind, v, f64(0.5), sigma, sigma - 0.1, eta=0.7, sigma_max=0.96, noise=f64(1.2))
    (slope,) = torch.autograd.grad(out.mean.sum(), v)
    assert slope.item() == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_log_prob_gradient_by_finite_differences(kind):
    v, x, z = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
    at = {"eta": 0.6, "sigma_max": 0.96}
    reached = step(kind, v, x, 0.8, 0.7, noise=z, **at).x_next

    def log_prob(velocity):
        return step(kind, velocity, x, 0.8, 0.7, x_next=reached, **at).log_prob

    assert torch.autograd.gradcheck(log_prob, v.clone().requires_grad_())


def test_the_sample_is_data():
    v = draw(2, 3).requires_grad_()
    out = step("flow_sde", v, draw(2, 3), 0.8, 0.7, eta=0.7, sigma_max=0.96, noise=draw(2, 3))
    assert not out.x_next.requires_grad
    assert out.log_prob.requires_grad


def test_rows_without_noise_answer_zero_with_zero_gradient():
    v = draw(3, 4).requires_grad_()
    to = torch.tensor([0.7, 0.0, 0.5], dtype=torch.float64)
    out = step("cps_density", v, draw(3, 4), 0.8, to, eta=0.8, sigma_max=0.96, noise=draw(3, 4))
    assert out.log_prob[1] == 0
    assert (out.log_prob[[0, 2]] != 0).all()
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), v)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    still = gaussian_log_prob(draw(1, 2), draw(1, 2), torch.zeros(1).double())
    assert still.item() == 0


def test_last_step_of_the_sd3_schedule_is_finite_in_float32():
    sigmas = sd3_shift(10)
    v, x = draw(2, 16).float(), draw(2, 16, seed=1).float()
    out = step(
        "flow_sde", v, x, sigmas[-2], sigmas[-1], eta=0.7, sigma_max=sigmas[1], noise=v.clone()
    )
    assert out.std.item() == pytest.approx(0.006278, abs=1e-6)
    assert out.log_prob.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype):
    v, x, z = (draw(2, 64, seed=seed).to(dtype) for seed in range(3))
    half = step("flow_sde", v, x, 0.8, 0.7, eta=0.7, sigma_max=0.96, noise=z)
    full = step(
        "flow_sde", v.float(), x.float(), 0.8, 0.7, eta=0.7, sigma_max=0.96, noise=z.float()
    )
    assert {half.x_next.dtype, half.mean.dtype, half.log_prob.dtype} == {torch.float32}
    torch.testing.assert_close(half.log_prob, full.log_prob, rtol=0, atol=1e-6)


def test_per_sample_sigma_equals_one_sample_at_a_time():
    v, x, z = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2)
    sigma = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    for kind in KERNELS:
        if kind.startswith("ddim"):
            sigma = sigma.clamp(max=0.99)  # a step from sigma = 1 is not defined there
        batch = step(kind, v, x, sigma, sigma - 0.2, eta=0.5, sigma_max=0.9, noise=z)
        for row, level in enumerate(sigma.tolist()):
            one = slice(row, row + 1)
            alone = step(
                kind, v[one], x[one], level, level - 0.2, eta=0.5, sigma_max=0.9, noise=z[one]
            )
            torch.testing.assert_close(batch.x_next[one], alone.x_next, rtol=0, atol=EXACT)
            torch.testing.assert_close(batch.log_prob[one], alone.log_prob, rtol=0, atol=EXACT)


def test_noise_is_drawn_when_none_is_given():
    torch.manual_seed(3)
    first = step("dance_sde", f64(0.1), f64(0.2), 0.8, 0.7, eta=0.3, sigma_max=1.0)
    torch.manual_seed(3)
    again = step("dance_sde", f64(0.1), f64(0.2), 0.8, 0.7, eta=0.3, sigma_max=1.0)
    assert torch.equal(first.x_next, again.x_next)
    assert not torch.equal(first.x_next, first.mean)


def test_wrong_arguments_are_named():
    at = {"eta": 0.3, "sigma_max": 1.0}
    with pytest.raises(ValueError, match=r"unknown step kernel 'flow'.*flow_sde"):
        step("flow", f64(0), f64(0), 0.8, 0.7, **at)
    with pytest.raises(ValueError, match="not both"):
        step("dance_sde", f64(0), f64(0), 0.8, 0.7, noise=f64(0), x_next=f64(0), **at)
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        step("dance_sde", f64(0, 1), f64(0, 1), 0.8, 0.7, noise=f64(0, 1), reduce="max", **at)
