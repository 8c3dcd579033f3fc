"""Noises finished samples again: the decisions of methods that train on the forward process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmgrpo.core.diffusion import MatchingRule, Process
from mmgrpo.core.seeding import generator
from mmgrpo.core.trajectories import Trajectories

STREAM = 0x6D61746368
"""First part of the draws' stream names, so that no stream of the denoising has such a name."""


class NoisedModel(Protocol):
    """What is asked of a model's family."""

    @property
    def process(self) -> Process:
        """How its clean samples are noised."""
        ...

    def nearest_level(self, sigma: Tensor) -> Tensor:
        """Return the noise levels ``[N, K]`` nearest to ``sigma`` at which it was trained."""
        ...


def on_clean_samples(
    trajectories: Trajectories, target: Tensor, sigma: Tensor, payload: Any
) -> Trajectories:
    """Replace the denoising decisions of a rollout by draws on what it ended in.

    The log-probabilities under the sampling weights stay open: whoever trains evaluates them.

    Args:
        trajectories: the rollout.
        target: ``[B, K, ...]``, see :func:`draw_matching`.
        sigma: ``[B, K]``.
        payload: of the clean samples.
    """
    return Trajectories(
        group=trajectories.group,
        mask=torch.ones_like(sigma, dtype=torch.bool),
        version=trajectories.version,
        stratum=trajectories.stratum,
        target=target,
        sigma=sigma,
        payload=payload,
    )


def draw_matching(
    clean: Tensor,
    names: Sequence[tuple[int, ...]],
    rule: MatchingRule,
    schedule: Tensor,
    model: NoisedModel,
) -> tuple[Tensor, Tensor]:
    """Draw K noises and noise levels for each clean sample.

    A model that was trained at some levels only, as a UNet is, gets the nearest of them.

    Streams are named by (seed, prompt, sample, draw), without the sample where the group shares.

    Args:
        clean: ``[B, ...]``.
        names: ``(seed, prompt.index, member)`` of each sample.
        rule: how many, and at which levels.
        schedule: ``[S + 1]`` noise levels of the rollout.
        model: knows at which levels it was trained and what it shall predict.

    Returns:
        Targets ``[B, K, ...]`` (noise - clean for a flow) and noise levels ``[B, K]``, float32.
    """
    owners = [(STREAM, *(name[:2] if rule.shared else name)) for name in names]
    drawn = {owner: rule.sigmas(schedule, generator(*owner)) for owner in dict.fromkeys(owners)}
    sigma = model.nearest_level(torch.stack([drawn[owner] for owner in owners])).to(clean.device)
    noise = {
        owner: torch.stack(
            [
                torch.randn(clean.shape[1:], generator=generator(*owner, draw))
                for draw in range(sigma.shape[1])
            ]
        )
        for owner in drawn
    }
    stacked = torch.stack([noise[owner] for owner in owners]).to(clean.device)
    return model.process.prediction(clean[:, None], stacked), sigma
