"""One denoising step as a Gaussian policy: mean, standard deviation, sample and log-density.

Noise level is time: sigma = 1 is pure noise, sigma = 0 is clean, and
``x_sigma = (1 - sigma) x0 + sigma e``. The velocity is ``v = e - x0``, so the predicted ends are
``x0hat = x - sigma v`` and ``ehat = x + (1 - sigma) v``. A step goes from sigma to a smaller
sigma', with ``dt = sigma' - sigma < 0``. Every kernel answers with the mean and the standard
deviation of the step itself: std already contains sqrt(-dt), and nobody multiplies again.

The ``ddim`` kernels are for variance-preserving diffusion, ``x_sigma = sqrt(1 - sigma^2) x0 +
sigma e``: there the prediction that takes the velocity's place is the noise e.

Legend: B samples; ``...`` the latent dimensions of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from mmgrpo.core.diffusion.gaussian import (
    LogDensity,
    StepOutput,
    align,
    at_least_float32,
    finish,
    gaussian,
    scalars,
    squared_residual,
)

AT_ONE = 1.0 - 1e-6
"""Noise levels above this count as sigma = 1."""

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class State:
    """Where a step starts and how far it goes; every tensor broadcasts against ``x``."""

    velocity: Tensor
    x: Tensor
    sigma: Tensor
    sigma_next: Tensor
    eta: Tensor
    sigma_max: Tensor

    @property
    def dt(self) -> Tensor:
        """Length of the step, negative."""
        return self.sigma_next - self.sigma

    @property
    def x0(self) -> Tensor:
        """Predicted clean image."""
        return self.x - self.sigma * self.velocity

    @property
    def noise(self) -> Tensor:
        """Predicted noise."""
        return self.x + (1 - self.sigma) * self.velocity


def ode(at: State) -> Moments:
    """Euler step ``x + v dt``; no noise."""
    return at.x + at.velocity * at.dt, torch.zeros_like(at.sigma)


def flow_sde(at: State) -> Moments:
    """SDE with ``g = eta sqrt(sigma / (1 - sigma))`` (Flow-GRPO, arXiv:2505.05470).

    At sigma = 1, where g is infinite, ``1 - sigma`` is taken at ``sigma_max``.
    """
    capped = torch.where(at.sigma > AT_ONE, at.sigma_max, at.sigma)
    return sde(at, at.eta * (at.sigma / (1 - capped)).sqrt())


def dance_sde(at: State) -> Moments:
    """SDE with constant ``g = eta`` (DanceGRPO, arXiv:2505.07818)."""
    return sde(at, at.eta)


def cps(at: State) -> Moments:
    """Coefficients-preserving sampling (arXiv:2509.05952): the noise level stays exactly sigma'.

    ``eta`` in [0, 1] is the share of the noise, as an angle of ``eta pi / 2``, that is drawn anew.
    """
    angle = at.eta * (math.pi / 2)
    mean = (1 - at.sigma_next) * at.x0 + at.sigma_next * angle.cos() * at.noise
    return mean, at.sigma_next * angle.sin()


def sde_dpmpp(at: State) -> Moments:
    """First-order SDE-DPM-Solver++ (arXiv:2211.01095); eta = 1 is the paper's, eta = 0 is Euler."""
    decay = exp_minus_h(at.sigma, at.sigma_next)
    kept = decay**at.eta
    mean = at.sigma_next / at.sigma * kept * at.x + (1 - at.sigma_next) * (1 - decay * kept) * at.x0
    return mean, at.sigma_next * (1 - kept**2).sqrt()


def ddim_eta(at: State) -> Moments:
    """DDIM step of a model that predicts noise (arXiv:2010.02502, eq. 12 and 16).

    eta = 1 has the std of the DDPM posterior, eta = 0 is deterministic. To sigma' = 0 there is no
    noise. At sigma = 1 nothing is left of the image, and the step is not defined.
    """
    before, after = signal_power(at.sigma), signal_power(at.sigma_next)
    span = (at.sigma - at.sigma_next) * (at.sigma + at.sigma_next)
    share = (at.eta / at.sigma) ** 2 * span / after  # std = sigma' sqrt(share)
    kept = at.sigma_next * (1 - share).clamp(min=0).sqrt()
    mean = (after / before).sqrt() * (at.x - at.sigma * at.velocity) + kept * at.velocity
    return mean, at.sigma_next * share.sqrt()


def ddim(at: State) -> Moments:
    """Deterministic DDIM step (arXiv:2010.02502)."""
    return ddim_eta(replace(at, eta=torch.zeros_like(at.eta)))


def signal_power(sigma: Tensor) -> Tensor:
    """1 - sigma^2 (alpha bar of a variance-preserving process), without cancellation."""
    return (1 - sigma) * (1 + sigma)


def sde(at: State, g: Tensor) -> Moments:
    """Reverse SDE with diffusion g, whose drift keeps the marginals of the ODE."""
    pull = g**2 / (2 * at.sigma)
    mean = at.x * (1 + pull * at.dt) + at.velocity * (1 + pull * (1 - at.sigma)) * at.dt
    return mean, g * (-at.dt).sqrt()


@dataclass(frozen=True)
class Kernel:
    """A kind of step.

    Attributes:
        moments: mean and std; the mean is linear and homogeneous in (velocity, x).
        log_density: what scores its sample.
        eta: published noise scale, where a run does not say otherwise.
        still: the kernel without noise that follows the same process.
    """

    moments: Callable[[State], Moments]
    log_density: LogDensity = gaussian
    eta: float = 0.0
    still: str = "ode"


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "ode": Kernel(ode),
        "flow_sde": Kernel(flow_sde, eta=0.7),
        "dance_sde": Kernel(dance_sde, eta=0.3),
        "cps": Kernel(cps, squared_residual, eta=0.8),
        "cps_density": Kernel(cps, eta=0.8),
        "sde_dpmpp": Kernel(sde_dpmpp, eta=1.0),
        "ddim": Kernel(ddim, still="ddim"),
        "ddim_eta": Kernel(ddim_eta, eta=1.0, still="ddim"),
    }
)
"""``cps`` scores by the published ``-(x' - mean)^2``, which has neither variance nor constants;
``cps_density`` is the same step scored by its Gaussian log-density."""


def transition(
    kind: str,
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    eta: Tensor | float,
    sigma_max: Tensor | float,
) -> Moments:
    """Return the mean ``[B, ...]`` and the std (``[]`` or ``[B]``) of a step; see :func:`step`."""
    if kind not in KERNELS:
        raise ValueError(f"unknown step kernel '{kind}'; valid: {', '.join(KERNELS)}.")
    velocity, x = at_least_float32(velocity), at_least_float32(x)
    raw = scalars(x, sigma, sigma_next, eta, sigma_max)
    mean, std = KERNELS[kind].moments(State(velocity, x, *(align(value, x) for value in raw)))
    return mean, std.reshape(raw[0].shape)


def step(
    kind: str,
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    eta: Tensor | float,
    sigma_max: Tensor | float,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
    reduce: str = "mean",
) -> StepOutput:
    """Take one denoising step, or evaluate one that was taken.

    Everything is computed in float32 or better, whatever the network's type.

    Args:
        kind: a name in :data:`KERNELS`.
        velocity: ``[B, ...]`` predicted velocity ``e - x0`` at (x, sigma); the predicted noise for
            the ``ddim`` kernels.
        x: ``[B, ...]`` state before the step.
        sigma: noise level before the step, a scalar or ``[B]``.
        sigma_next: noise level after the step, a scalar or ``[B]``.
        eta: noise scale of the kernel (a for ``flow_sde`` and ``cps``, g for ``dance_sde``, share
            of the DDPM posterior's std for ``ddim_eta``).
        sigma_max: second entry of the schedule, which stands in for sigma in ``1 - sigma`` at
            sigma = 1 (``flow_sde`` only).
        noise: ``[B, ...]`` standard normal; drawn from torch's global generator if None.
        x_next: ``[B, ...]`` the state that was reached, to evaluate it again.
        reduce: ``mean`` or ``sum`` of the log-density over the latent elements. The field takes
            the mean, which makes the ratio the D-th root of the density ratio.

    Raises:
        ValueError: unknown ``kind`` or ``reduce``, or both ``noise`` and ``x_next`` given.
    """
    mean, std = transition(kind, velocity, x, sigma, sigma_next, eta=eta, sigma_max=sigma_max)
    log_density = KERNELS[kind].log_density
    return finish(mean, std, noise=noise, x_next=x_next, reduce=reduce, log_density=log_density)


def exp_minus_h(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return ``exp(lambda - lambda')``, lambda = ln((1 - sigma) / sigma).

    0 from sigma = 1 and to sigma = 0, where lambda is infinite.
    """
    return (1 - sigma) * sigma_next / (sigma * (1 - sigma_next))
