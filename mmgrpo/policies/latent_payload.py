"""What a flow policy needs to evaluate denoising steps again: the states visited and the rule.

Shapes: P unique prompts; B rows of S denoising steps, hence S + 1 states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mmgrpo.core.diffusion import StepRule

Embeddings = dict[str, Tensor]
"""Name -> ``[P, ...]``, one row per prompt."""


@dataclass(frozen=True)
class LatentPrompts:
    """Unique prompts, each stored once, and how strongly they guide.

    Attributes:
        embeddings: name -> ``[P, ...]``.
        guidance_scale: of the rollout; every evaluation uses it too.
        negative: name -> ``[1, ...]``, the empty prompt where guidance needs it.
    """

    embeddings: Embeddings
    guidance_scale: float = 1.0
    negative: Embeddings | None = None

    def __len__(self) -> int:
        return next(iter(self.embeddings.values())).shape[0]

    def rows(self, prompt_row: Tensor) -> Embeddings:
        """Return name -> ``[N, ...]`` for the given prompts, repeats allowed."""
        return {name: value[prompt_row] for name, value in self.embeddings.items()}

    def select(self, rows: Tensor) -> Self:
        """Return the given prompts."""
        return replace(self, embeddings=self.rows(rows))

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        return replace(
            self,
            embeddings=_moved(self.embeddings, device),
            negative=None if self.negative is None else _moved(self.negative, device),
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join prompts of one guidance scale."""
        first = parts[0]
        return replace(
            first,
            embeddings={
                name: torch.cat([part.embeddings[name] for part in parts])
                for name in first.embeddings
            },
        )


@dataclass(frozen=True)
class LatentPayload:
    """Denoising trajectories and the prompts they were drawn for.

    Attributes:
        prompts: the unique prompts.
        prompt_row: ``[B]`` int64 index into the prompts.
        latents: ``[B, S + 1, ...]`` float32, every state from pure noise to the final latent.
        sigmas: ``[S + 1]`` float32 noise levels of the states.
        rule: how the stochastic steps were sampled.
        owner: ``[B, S + 1]`` int64; rows of one prompt with equal ids at a level have the same
            state there, so that an evaluation calls the network once for all of them.
    """

    prompts: LatentPrompts
    prompt_row: Tensor
    latents: Tensor
    sigmas: Tensor
    rule: StepRule
    owner: Tensor | None = None

    def select(self, rows: Tensor) -> Self:
        """Return the given rows and the prompts they need."""
        kept, prompt_row = torch.unique(self.prompt_row[rows], return_inverse=True)
        return replace(
            self,
            prompts=self.prompts.select(kept),
            prompt_row=prompt_row,
            latents=self.latents[rows],
            owner=None if self.owner is None else self.owner[rows],
        )

    def distinct(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Find which of N decisions start from the same state.

        Args:
            rows: ``[N]`` int64.
            steps: ``[N]`` int64.

        Returns:
            ``[U]`` positions among the N, one per distinct state, and ``[N]`` where each
            decision's state is among the U.
        """
        place = torch.arange(len(rows), device=rows.device)
        if self.owner is None:
            return place, place
        key = torch.stack([self.prompt_row[rows], self.owner[rows, steps], steps], dim=1)
        unique, index = torch.unique(key, dim=0, return_inverse=True)
        if len(unique) == len(rows):
            return place, place
        first = place.new_full((len(unique),), len(rows))
        return first.scatter_reduce(0, index, place, "amin"), index

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        return replace(
            self,
            prompts=self.prompts.to(device),
            prompt_row=self.prompt_row.to(device),
            latents=self.latents.to(device),
            sigmas=self.sigmas.to(device),
            owner=None if self.owner is None else self.owner.to(device),
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join rollouts that were drawn with the same schedule, rule and guidance.

        Raises:
            ValueError: they were not.
        """
        first = parts[0]
        starts = [0]
        for part in parts:
            _check_same_sampling(part, first)
            starts.append(starts[-1] + len(part.prompts))
        return replace(
            first,
            prompts=LatentPrompts.cat([part.prompts for part in parts]),
            prompt_row=torch.cat(
                [part.prompt_row + start for part, start in zip(parts, starts, strict=False)]
            ),
            latents=torch.cat([part.latents for part in parts]),
            owner=_joined([part.owner for part in parts]),
        )


def _check_same_sampling(one: LatentPayload, other: LatentPayload) -> None:
    same = one.rule == other.rule and one.prompts.guidance_scale == other.prompts.guidance_scale
    if not same or not torch.equal(one.sigmas, other.sigmas):
        described = (
            f"{p.rule}, guidance {p.prompts.guidance_scale}, {len(p.sigmas) - 1} steps"
            for p in (one, other)
        )
        raise ValueError(
            "rollouts of different schedules, step rules or guidance scales cannot be one batch: "
            + " against ".join(described)
            + "."
        )


def _joined(owners: Sequence[Tensor | None]) -> Tensor | None:
    known = [owner for owner in owners if owner is not None]
    return torch.cat(known) if len(known) == len(owners) else None


def _moved(embeddings: Embeddings, device: torch.device) -> Embeddings:
    return {name: value.to(device) for name, value in embeddings.items()}
