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
        low, high: clip widths; ``high > low`` is DAPO's clip-higher (arXiv:2503.14476).
        dual: for A < 0 the loss is capped at ``-dual * A`` (dual-clip PPO).
        delta: two-sided clip: the ratio never exceeds ``delta`` (INTELLECT-2, arXiv:2505.07291).
    """
    positive = advantage > 0
    negative = advantage < 0
    cap = min((value for value in (dual, delta) if value is not None), default=torch.inf)
    top = 1.0 + high if delta is None else min(1.0 + high, delta)
    upper = torch.where(positive, _full(ratio, top), _full(ratio, cap))
    lower = torch.where(negative, _full(ratio, 1.0 - low), _full(ratio, 0.0))
    return bounded(ratio, lower, upper)
