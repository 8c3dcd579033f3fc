"""Trust-region rules: which ratio enters the surrogate, and which decisions keep their gradient.

Every hard clip of the field is the policy-gradient term -ratio * A with the ratio replaced, on the
side where the surrogate would otherwise still gain, by a constant bound. A rule maps
(ratio, advantage) ``[B, T]`` to a :class:`Region`; the surrogate multiplies it with the advantage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def unclipped(ratio: Tensor, advantage: Tensor) -> Region:
    """No trust region."""
    return Region(ratio, torch.ones_like(ratio, dtype=torch.bool))


def ppo_clip(
    ratio: Tensor,
    advantage: Tensor,
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
