"""Trust-region rules: which ratio enters the surrogate, and which decisions keep their gradient.

Every hard clip of the field is the policy-gradient term -ratio * A with the ratio replaced, on the
side where the surrogate would otherwise still gain, by a constant bound. A rule maps
(ratio, advantage, divergence) ``[B, T]`` to a :class:`Region`; the surrogate multiplies it with the
advantage. The divergence from the old policy is there for the rules that read it only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

READS_DIVERGENCE = frozenset({"divergence_mask"})
"""Rules that read the divergence of each decision from the old policy."""


class Region(NamedTuple):
    """Effective ratio ``[B, T]`` and ``kept [B, T]`` bool, False where the gradient is cut."""

    ratio: Tensor
    kept: Tensor


def bounded(ratio: Tensor, lower: Tensor, upper: Tensor) -> Region:
    """Replace the ratio by a constant bound where it lies outside [lower, upper]."""
    inside = torch.maximum(torch.minimum(ratio, upper), lower)
    kept = (ratio >= lower) & (ratio <= upper)
    return Region(torch.where(kept, ratio, inside.detach()), kept)


def _full(ratio: Tensor, value: float) -> Tensor:
    return torch.full_like(ratio, value)


def unclipped(ratio: Tensor, advantage: Tensor, divergence: Tensor | None = None) -> Region:
    """No trust region."""
    return Region(ratio, torch.ones_like(ratio, dtype=torch.bool))


def ppo_clip(
    ratio: Tensor,
    advantage: Tensor,
    divergence: Tensor | None = None,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    delta: float | None = None,
) -> Region:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) as one-sided bounds.

    Args:
        ratio: ``[B, T]`` > 0.
        advantage: ``[B, T]``.
        divergence: not read.
        low: clip width below 1.
        high: clip width above 1; ``high > low`` is DAPO's clip-higher (arXiv:2503.14476).
        dual: for A < 0 the loss is capped at ``-dual * A`` (dual-clip PPO).
        delta: two-sided clip: the ratio never exceeds ``delta`` (INTELLECT-2, arXiv:2505.07291).

    Raises:
        ValueError: a negative width, or a cap inside the clip range, which would hide it.
    """
    if low < 0 or high < 0:
        raise ValueError(f"clip widths must not be negative; got low {low}, high {high}")
    caps = [cap for cap in (dual, delta) if cap is not None]
    if any(cap <= 1.0 + high for cap in caps):
        raise ValueError(f"dual and delta must exceed 1 + high = {1.0 + high}; got {min(caps)}")
    cap = min(caps, default=torch.inf)
    upper = torch.where(advantage > 0, _full(ratio, 1.0 + high), _full(ratio, cap))
    lower = torch.where(advantage < 0, _full(ratio, 1.0 - low), _full(ratio, 0.0))
    return bounded(ratio, lower, upper)


def divergence_mask(
    ratio: Tensor, advantage: Tensor, divergence: Tensor | None = None, *, delta: float = 1e-5
) -> Region:
    """Cut the gradient where the step's distribution has moved far (Flow-DPPO, arXiv:2606.11025).

    A decision is cut where the divergence is at least delta and the ratio has already moved the
    way the advantage pulls it: above 1 for A > 0, below 1 for A < 0.

    Args:
        ratio: ``[B, T]`` > 0.
        advantage: ``[B, T]``.
        divergence: ``[B, T]`` from the old policy, for denoising steps mean (mu - mu_old)^2 /
            (2 s^2).
        delta: radius; infinite is no trust region.

    Raises:
        ValueError: no divergence, or a radius that is not positive.
    """
    if delta <= 0:
        raise ValueError(f"delta must be positive; got {delta}")
    if divergence is None:
        raise ValueError("the divergence mask needs the divergence from the old policy")
    gained = torch.where(advantage > 0, ratio > 1, (advantage < 0) & (ratio < 1))
    kept = ~(gained & (divergence.detach() >= delta))
    return Region(torch.where(kept, ratio, torch.zeros_like(ratio)), kept)
