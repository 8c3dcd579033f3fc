"""Steps beside the flow kernels: DDIM for noise-predicting models, a second-order ODE solver."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.diffusion.gaussian import (
    StepOutput,
    align,
    at_least_float32,
    scalars,
)
from mmgrpo.core.diffusion.kernels import exp_minus_h, step


def ddim_eta(
    epsilon: Tensor,
    x: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_next: Tensor | float,
    *,
    eta: Tensor | float,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
    reduce: str = "mean",
) -> StepOutput:
    """Take or evaluate a DDIM step of an epsilon-predicting model (arXiv:2010.02502, eq. 12, 16).

    eta = 1 has the DDPM posterior's std, eta = 0 is deterministic.

    Args:
        epsilon: ``[B, ...]`` predicted noise.
        x: ``[B, ...]`` state before the step.
        alpha_bar: cumulative signal power before the step, in (0, 1); a scalar or ``[B]``.
        alpha_bar_next: cumulative signal power after the step, in [alpha_bar, 1].
        eta: share of the DDPM posterior's std.
        noise: ``[B, ...]`` standard normal; drawn from torch's global generator if None.
        x_next: ``[B, ...]`` the state that was reached, to evaluate it again.
        reduce: ``mean`` or ``sum`` of the log-density over the latent elements.
    """
    x = at_least_float32(x)
    levels = [(1 - bar).sqrt() for bar in scalars(x, alpha_bar, alpha_bar_next)]
    return step(
        "ddim_eta",
        epsilon,
        x,
        *levels,
        eta=eta,
        sigma_max=1.0,
        noise=noise,
        x_next=x_next,
        reduce=reduce,
    )


def dpmpp_2m(
    x0: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    previous: tuple[Tensor, Tensor | float] | None = None,
    heun: bool = False,
) -> Tensor:
    """Return the state after a deterministic DPM-Solver++(2M) step (arXiv:2211.01095).

    First order (equal to Euler) without ``previous``, on the step to sigma = 0, and where the
    step or the one before started at sigma = 1, whose log signal-to-noise ratio is infinite.

    Args:
        x0: ``[B, ...]`` clean prediction at (x, sigma).
        x: ``[B, ...]`` state before the step.
        sigma: noise level before the step, a scalar or ``[B]``.
        sigma_next: noise level after the step, a scalar or ``[B]``.
        previous: the clean prediction and the sigma of the step before.
        heun: the Heun form of the second-order term in place of the midpoint form.
    """
    x0, x = at_least_float32(x0), at_least_float32(x)
    start, end = (align(scalar, x) for scalar in scalars(x, sigma, sigma_next))
    decay = exp_minus_h(start, end)
    x_next = end / start * x + (1 - end) * (1 - decay) * x0
    if previous is None:
        return x_next
    (before,) = (align(scalar, x) for scalar in scalars(x, previous[1]))
    h, h_before = -decay.log(), -exp_minus_h(before, start).log()
    usable = h.isfinite() & h_before.isfinite()
    h = torch.where(usable, h, 1.0)
    slope = torch.where(usable, h / h_before, 0.0) * (x0 - previous[0])
    factor = 1 - (1 - decay) / h if heun else (1 - decay) / 2
    return x_next + (1 - end) * factor * slope
