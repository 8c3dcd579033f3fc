"""Each kernel's density against the samples that the same kernel draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mmgrpo.core.diffusion import ddim_eta, step

COUNT = 100_000
STEPS = [(1.0, 0.9), (0.8, 0.7), (0.3, 0.1)]
GAUSSIAN = ["flow_sde", "dance_sde", "cps_density", "sde_dpmpp"]


def take(kind, at, *, noise=None, x_next=None, count=COUNT):
    """One step from x = 0.5 with velocity -0.3 in float64."""
    x = torch.full((count, 1), 0.5, dtype=torch.float64)
    v = torch.full((count, 1), -0.3, dtype=torch.float64)
    return step(kind, v, x, *at, eta=0.6, sigma_max=0.96, noise=noise, x_next=x_next)


def ddim(_kind, at, *, noise=None, x_next=None, count=COUNT):
    """The same for a model that predicts noise; ``at`` gives the powers of the noise."""
    x = torch.full((count, 1), 0.5, dtype=torch.float64)
    epsilon = torch.full((count, 1), -0.3, dtype=torch.float64)
    before, after = (max(1 - level, 0.01) for level in at)
    return ddim_eta(epsilon, x, before, after, eta=1.0, noise=noise, x_next=x_next)


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(COUNT, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("at", STEPS, ids=str)
@pytest.mark.parametrize("kind", [*GAUSSIAN, "ddim_eta"])
def test_the_density_is_that_of_the_samples(kind, at):
    """Share of the samples in ten intervals against the integral of exp(log_prob)."""
    move = ddim if kind == "ddim_eta" else take
    drawn = move(kind, at, noise=noise(3))
    std = float(drawn.std)
    edges = float(drawn.mean[0]) + std * torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    for low, high in itertools.pairwise(edges):
        grid = torch.linspace(float(low), float(high), 201, dtype=torch.float64)[:, None]
        density = move(kind, at, x_next=grid, count=201).log_prob.exp()
        wanted = torch.trapezoid(density, grid[:, 0]).item()
        found = ((drawn.x_next >= low) & (drawn.x_next < high)).double().mean().item()
        assert found == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / COUNT))
    entropy = math.log(std) + (1 + math.log(2 * math.pi)) / 2
    assert drawn.log_prob.mean().item() == pytest.approx(-entropy, abs=5 / math.sqrt(2 * COUNT))


@pytest.mark.parametrize("at", STEPS, ids=str)
def test_the_published_score_of_cps_is_minus_the_variance_on_average(at):
    drawn = take("cps", at, noise=noise(4))
    variance = float(drawn.std) ** 2
    error = 5 * variance * math.sqrt(2 / COUNT)
    assert drawn.log_prob.mean().item() == pytest.approx(-variance, abs=error)


@pytest.mark.parametrize("at", STEPS, ids=str)
@pytest.mark.parametrize("kind", [*GAUSSIAN, "cps"])
def test_without_noise_every_kernel_steps_along_the_ode(kind, at):
    x, v = (torch.randn(3, 2, dtype=torch.float64) for _ in range(2))
    found = step(kind, v, x, *at, eta=0.0, sigma_max=0.96)
    torch.testing.assert_close(found.x_next, x + v * (at[1] - at[0]), rtol=0, atol=1e-12)
    assert (found.log_prob == 0).all()
