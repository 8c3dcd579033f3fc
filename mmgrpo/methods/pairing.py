"""Before the update of a preference method: which rows of a group are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.core.objectives import PAIRS_DECISIONS
from mmgrpo.core.pairs import in_pairs, paired_signs
from mmgrpo.core.trajectories import Trajectories

if TYPE_CHECKING:
    from mmgrpo.methods.method import Method


def pair_up(
    method: Method, trajectories: Trajectories, rewards: Mapping[str, Tensor]
) -> Trajectories:
    """Choose the pairs among the rows that are left, and train only what they compare.

    The advantage of a preferred row becomes 1, of a rejected one -1; rows without a pair leave the
    mask.

    Args:
        method: the method.
        trajectories: a whole update with its shaped ``reward``.
        rewards: the named rewards ``[B]``.
    """
    there = trajectories.mask.any(dim=1)
    weights = method.reward_weights

    def offered(reward: Tensor, weight: float = 1.0) -> Tensor:
        return torch.where(there, weight * reward, torch.full_like(reward, torch.nan))

    assert trajectories.reward is not None
    pairs = method.pairs(
        trajectories.replace(
            reward=offered(trajectories.reward),
            rewards={
                name: offered(reward, weights.get(name, 1.0)) for name, reward in rewards.items()
            },
        )
    )
    by_decision = method.component("objective") in PAIRS_DECISIONS
    mask = in_pairs(pairs, trajectories.mask, by_decision=by_decision)
    advantage = paired_signs(pairs, trajectories.reward)[:, None] * mask
    return trajectories.replace(pairs=pairs, mask=mask, advantage=advantage)
