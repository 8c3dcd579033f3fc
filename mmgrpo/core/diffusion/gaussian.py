"""The Gaussian that a stochastic denoising step is: its sample and its log-density."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

STD_FLOOR = 1e-6
"""Below this standard deviation a step is deterministic: no decision, log-probability 0."""

_REDUCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"mean": torch.mean, "sum": torch.sum}
)

LogDensity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepOutput:
    """A denoising step.

    Attributes:
        x_next: ``[B, ...]`` the state after the step, detached: it is data, never differentiated.
        mean: ``[B, ...]`` mean of the step; carries the gradient of the velocity.
        std: ``[]`` or ``[B]`` standard deviation of the step; depends on the schedule only.
        log_prob: ``[B]`` log-density of ``x_next`` (nats, per element unless ``reduce="sum"``); 0
            where std < ``STD_FLOOR``. Such a step is not a decision and must be masked out.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor


def gaussian(residual: Tensor, std: Tensor) -> Tensor:
    """Return log N(residual; 0, std^2) of each element, in nats."""
    return -((residual / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2


def squared_residual(residual: Tensor, _std: Tensor) -> Tensor:
    """Return ``-residual^2``, what the public code of coefficients-preserving sampling uses."""
    return -(residual**2)


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    reduce: str = "mean",
    log_density: LogDensity = gaussian,
) -> Tensor:
    """Return ``[B]`` log N(x; mean, std^2 I) in nats, reduced over the latent elements.

    Rows whose std is below ``STD_FLOOR`` answer 0 with gradient 0: their density is infinite.

    Args:
        x: ``[B, ...]`` where the density is taken.
        mean: ``[B, ...]``.
        std: ``[]`` or ``[B]``.
        reduce: ``mean`` or ``sum`` over the elements of a sample.
        log_density: of one element, given the residual and the std.
    """
    random = std >= STD_FLOOR
    safe = align(torch.where(random, std, 1.0), mean)
    return torch.where(random, over_elements(log_density(x - mean, safe), reduce), 0.0)


def finish(
    mean: Tensor,
    std: Tensor,
    *,
    noise: Tensor | None,
    x_next: Tensor | None,
    reduce: str,
    log_density: LogDensity = gaussian,
) -> StepOutput:
    """Draw ``mean + std noise``, or take the given ``x_next``, and evaluate its density."""
    if noise is not None and x_next is not None:
        raise ValueError("give noise (to take a step) or x_next (to evaluate one), not both.")
    if x_next is None:
        x_next = _draw(mean, std, noise)
    x_next = at_least_float32(x_next).detach()
    log_prob = gaussian_log_prob(x_next, mean, std, reduce=reduce, log_density=log_density)
    return StepOutput(x_next, mean, std, log_prob)


def over_elements(values: Tensor, reduce: str) -> Tensor:
    """Return ``[B]``: the ``mean`` or ``sum`` of ``[B, ...]`` over all but the first dimension."""
    if reduce not in _REDUCTIONS:
        raise ValueError(f"unknown reduction '{reduce}'; valid: {', '.join(_REDUCTIONS)}.")
    return values if values.dim() < 2 else _REDUCTIONS[reduce](values.flatten(1), dim=1)


def scalars(x: Tensor, *values: Tensor | float) -> tuple[Tensor, ...]:
    """Return the scalars or ``[B]`` values as tensors of one shape, in the type of ``x``."""
    tensors = [torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in values]
    return torch.broadcast_tensors(*tensors)


def align(scalar: Tensor, x: Tensor) -> Tensor:
    """View ``[B]`` as ``[B, 1, ...]`` so that it broadcasts over the latent dimensions."""
    return scalar.reshape(scalar.shape + (1,) * (x.dim() - scalar.dim()))


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is in half precision, else ``x``."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _draw(mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        if not std.any():
            return mean
        noise = torch.randn_like(mean)
    return mean + align(std, mean) * noise
