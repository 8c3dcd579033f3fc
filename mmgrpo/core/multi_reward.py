"""Several rewards: combine before or after normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmgrpo.core.advantages import whiten
from mmgrpo.core.collective import LOCAL, Collective

Normalise = Callable[[Tensor], Tensor]


def weighted_sum(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_k w_k r_k over the rewards that apply; NaN where none does. ``[B]``."""
    stacked = torch.stack([rewards[name] * weights.get(name, 1.0) for name in rewards])
    total = stacked.nan_to_num(0.0).sum(dim=0)
    return torch.where(stacked.isnan().all(dim=0), torch.full_like(total, torch.nan), total)


def sum_then_normalise(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    normalise: Normalise,
    collective: Collective = LOCAL,
) -> Tensor:
    """A(sum_k w_k r_k)."""
    return normalise(weighted_sum(rewards, weights))


def normalise_then_sum(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    normalise: Normalise,
    collective: Collective = LOCAL,
) -> Tensor:
    """sum_k w_k A_k(r_k) (DanceGRPO, arXiv:2505.07818); a reward without spread adds nothing."""
    return weighted_sum({k: normalise(r) for k, r in rewards.items()}, weights).nan_to_num(0.0)


def gdpo(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    normalise: Normalise,
    collective: Collective = LOCAL,
) -> Tensor:
    """Normalise, sum, then whiten over the whole update, per sample (GDPO, arXiv:2601.05242)."""
    total = normalise_then_sum(rewards, weights, normalise, collective)
    return whiten(total, torch.ones_like(total), unbiased=True, collective=collective)
