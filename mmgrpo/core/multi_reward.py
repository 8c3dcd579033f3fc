"""Several rewards: combine before or after normalisation. NaN: a reward does not apply.

A combination maps the named rewards ``[B]`` to sample advantages ``[B]``; NaN where no reward
applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from mmgrpo.core.advantages import whiten
from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.groups import zero_nan

Normalise = Callable[[Tensor], Tensor]


def weighted_sum(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_k w_k r_k over the rewards that apply; NaN where none does. ``[B]``."""
    stacked = torch.stack([reward * weights.get(name, 1.0) for name, reward in rewards.items()])
    total = zero_nan(stacked).sum(dim=0)
    return torch.where(stacked.isnan().all(dim=0), torch.full_like(total, torch.nan), total)


def sum_then_normalise(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    normalise: Normalise,
    *,
    collective: Collective = LOCAL,
) -> Tensor:
    """A(sum_k w_k r_k)."""
    return normalise(weighted_sum(rewards, weights))


def normalise_then_sum(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    normalise: Normalise,
    *,
    unit_weights: bool = False,
    clip: float | None = None,
    collective: Collective = LOCAL,
) -> Tensor:
    """sum_k w_k A_k(r_k) (DanceGRPO, arXiv:2505.07818); a reward without spread adds nothing.

    Args:
        rewards: name -> ``[B]``.
        weights: name -> w_k, 1 where none is given.
        normalise: reward -> advantage, ``[B]``.
        unit_weights: divide the weights by their sum (MixGRPO, arXiv:2507.21802).
        clip: bound of the sum's absolute value; ``advantage.clip`` bounds each term.
        collective: not used.

    Raises:
        ValueError: ``unit_weights``, and the weights add up to nothing.
    """
    if unit_weights:
        weights = _unit(weights, rewards)
    total = weighted_sum({name: normalise(reward) for name, reward in rewards.items()}, weights)
    return total if clip is None else total.clamp(-clip, clip)


def _unit(weights: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The weights of the named rewards, divided by their sum."""
    own = {name: weights.get(name, 1.0) for name in names}
    total = sum(own.values())
    if total <= 0:
        raise ValueError(f"the weights of the rewards must have a positive sum; got {own}")
    return {name: weight / total for name, weight in own.items()}


def gdpo(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    normalise: Normalise,
    *,
    collective: Collective = LOCAL,
) -> Tensor:
    """Normalise, sum, then whiten over the samples of the update (GDPO, arXiv:2601.05242)."""
    total = normalise_then_sum(rewards, weights, normalise)
    whitened = whiten(zero_nan(total), ~total.isnan(), unbiased=True, collective=collective)
    return torch.where(total.isnan(), total, whitened)
