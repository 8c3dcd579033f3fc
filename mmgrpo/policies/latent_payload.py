"""What a flow policy needs to evaluate denoising steps again: the states visited and the rule.

Shapes: P unique prompts; B rows of S denoising steps, hence S + 1 states; N decisions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from mmgrpo.core.diffusion import StepOutput, StepRule
from mmgrpo.core.trajectories import Payload, Trajectories
from mmgrpo.errors import MethodError
from mmgrpo.protocols import Request

Embeddings = dict[str, Tensor]
"""Name -> ``[P, ...]``, one row per prompt."""


@dataclass(frozen=True)
class Decided:
    """N decisions of a batch, evaluated; each field ``[N, ...]``, None where not asked for."""

    log_prob: Tensor
    entropy: Tensor | None
    divergence: Tensor | None
    prediction: Tensor | None


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


class FlowPayload(Payload, Protocol):
    """A payload that a flow policy can evaluate.

    ``prompts`` are the unique prompts and ``prompt_row [B]`` each row's. The other verbs take N
    decisions, at ``rows [N]`` and ``steps [N]`` of the trajectories that carry the payload.
    """

    @property
    def prompts(self) -> LatentPrompts:
        """The unique prompts."""
        ...

    @property
    def prompt_row(self) -> Tensor:
        """``[B]`` int64 index into the prompts."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        ...

    def distinct(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[U]`` decisions with distinct states, and ``[N]`` each one's place there."""
        ...

    def states(
        self, trajectories: Trajectories, rows: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what goes through the network: latents ``[N, ...]``, noise levels ``[N]``."""
        ...

    def decide(
        self,
        trajectories: Trajectories,
        rows: Tensor,
        steps: Tensor,
        velocity: Tensor,
        request: Request,
    ) -> Decided:
        """Turn the velocities ``[N, ...]`` at the states into what the request asks for."""
        ...


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
        return replace(
            self,
            **selected_prompts(self, rows),
            latents=self.latents[rows],
            owner=None if self.owner is None else self.owner[rows],
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return tuple(self.latents.shape[2:])

    def states(
        self, trajectories: Trajectories, rows: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the states that the steps start from, see :class:`FlowPayload`."""
        del trajectories
        return self.latents[rows, steps], self.sigmas[steps]

    def decide(
        self,
        trajectories: Trajectories,
        rows: Tensor,
        steps: Tensor,
        velocity: Tensor,
        request: Request,
    ) -> Decided:
        """Evaluate the steps that were taken, see :class:`FlowPayload`."""
        rule, x, sigma = self.rule.at(steps), self.latents[rows, steps], self.sigmas[steps]
        x_next, sigma_next = self.latents[rows, steps + 1], self.sigmas[steps + 1]
        out = rule.step(velocity, x, sigma, sigma_next, x_next=x_next)
        divergence = None
        if request.divergence is not None:
            other = stored(trajectories, request.divergence_target)[rows, steps]
            divergence = rule.divergence(request.divergence, velocity, other, sigma, sigma_next)
        entropy = _entropy(out, rule.reduce) if request.entropy else None
        return Decided(out.log_prob, entropy, divergence, velocity)

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
        for part in parts:
            _check_same_sampling(part, parts[0])
        return replace(
            parts[0],
            **joined_prompts(parts),
            latents=torch.cat([part.latents for part in parts]),
            owner=_joined([part.owner for part in parts]),
        )


def selected_prompts(payload: FlowPayload, rows: Tensor) -> dict[str, Any]:
    """Return the fields ``prompts`` and ``prompt_row`` of the given rows."""
    kept, prompt_row = torch.unique(payload.prompt_row[rows], return_inverse=True)
    return {"prompts": payload.prompts.select(kept), "prompt_row": prompt_row}


def joined_prompts(parts: Sequence[FlowPayload]) -> dict[str, Any]:
    """Return the fields ``prompts`` and ``prompt_row`` of payloads joined row-wise."""
    starts = itertools.accumulate((len(part.prompts) for part in parts), initial=0)
    rows = [part.prompt_row + start for part, start in zip(parts, starts, strict=False)]
    prompts = LatentPrompts.cat([part.prompts for part in parts])
    return {"prompts": prompts, "prompt_row": torch.cat(rows)}


def stored(trajectories: Trajectories, target: str) -> Tensor:
    """Return the predictions ``[B, T, ...]`` that a divergence is measured from.

    Raises:
        MethodError: there are none.
    """
    found: Tensor | None = getattr(trajectories, f"{target}_prediction")
    if found is None:
        raise MethodError(
            f"The divergence is measured from the {target} prediction, "
            "and the trajectories have none."
        )
    return found


def _entropy(out: StepOutput, reduce: str) -> Tensor:
    """Entropy of the step's Gaussian: per latent element, or their sum."""
    per_element = out.std.log() + (1 + math.log(2 * math.pi)) / 2
    return per_element * (out.mean[0].numel() if reduce == "sum" else 1)


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
