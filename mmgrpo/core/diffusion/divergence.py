"""How far one step's Gaussian is from another with the same std: four published measures.

All kernels are linear in the velocity, so the difference of two means is the kernel applied to
the difference of the velocities at x = 0. Computing it so loses no digits to cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from mmgrpo.core.diffusion.gaussian import STD_FLOOR, at_least_float32, over_elements
from mmgrpo.core.diffusion.kernels import transition


@dataclass(frozen=True)
class Gap:
    """Squared distances ``[B]`` between two steps, their std and -dt (both ``[]`` or ``[B]``)."""

    mean: Tensor
    velocity: Tensor
    std: Tensor
    minus_dt: Tensor

    @property
    def kl(self) -> Tensor:
        """KL of the two Gaussians (nats); 0 where the step has no noise."""
        random = self.std >= STD_FLOOR
        return torch.where(random, self.mean / (2 * torch.where(random, self.std, 1.0) ** 2), 0.0)


DIVERGENCES: Mapping[str, Callable[[Gap], Tensor]] = MappingProxyType(
    {
        "exact": lambda gap: gap.kl,
        "code": lambda gap: gap.kl * gap.minus_dt,
        "velocity": lambda gap: gap.velocity,
        "mean": lambda gap: gap.mean,
    }
)


def step_divergence(
    kind: str,
    velocity: Tensor,
    other: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    kernel: str,
    eta: Tensor | float,
    sigma_max: Tensor | float,
    reduce: str = "mean",
) -> Tensor:
    """Return ``[B]`` the divergence between the steps that two velocities take from one state.

    ``exact`` is KL = (mu - mu')^2 / (2 std^2) (Flow-GRPO's formula; TempFlow and Pref-GRPO code);
    ``code`` is exact times -dt, what Flow-GRPO's program computes by dividing by g^2 in place of
    std^2: its published coefficients belong to this one; ``velocity`` is (v - v')^2 (DiffusionNFT,
    arXiv:2509.16117); ``mean`` is (mu - mu')^2. ``exact`` and ``code`` are 0 where the step has no
    noise.

    Args:
        kind: a name in :data:`DIVERGENCES`.
        velocity: ``[B, ...]`` velocity of the policy.
        other: ``[B, ...]`` velocity of what the policy is held to.
        sigma: noise level before the step, a scalar or ``[B]``.
        sigma_next: noise level after the step, a scalar or ``[B]``.
        kernel: the step kernel's name.
        eta: as in :func:`mmgrpo.core.diffusion.step`.
        sigma_max: as in :func:`mmgrpo.core.diffusion.step`.
        reduce: ``mean`` or ``sum`` over the latent elements.

    Raises:
        ValueError: unknown ``kind``, ``kernel`` or ``reduce``.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence '{kind}'; valid: {', '.join(DIVERGENCES)}.")
    gap = at_least_float32(velocity) - at_least_float32(other)
    shift, std = transition(
        kernel, gap, torch.zeros_like(gap), sigma, sigma_next, eta=eta, sigma_max=sigma_max
    )
    minus_dt = torch.as_tensor(sigma, dtype=std.dtype, device=std.device) - sigma_next
    mean_gap, velocity_gap = (over_elements(value**2, reduce) for value in (shift, gap))
    return DIVERGENCES[kind](Gap(mean_gap, velocity_gap, std, minus_dt))
