"""What a flow policy needs to evaluate decisions on the forward process: clean samples.

Shapes: P unique prompts; B rows of K (noise, level) draws; N decisions. The draws themselves are
``trajectories.target`` and ``trajectories.sigma``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mmgrpo.core.diffusion import MatchingRule, Process
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MethodError
from mmgrpo.policies.latent_payload import (
    Decided,
    LatentPrompts,
    joined_prompts,
    selected_prompts,
    stored,
)
from mmgrpo.protocols import Request


@dataclass(frozen=True)
class MatchingPayload:
    """Clean samples and the prompts they were drawn for.

    Attributes:
        prompts: the unique prompts.
        prompt_row: ``[B]`` int64 index into the prompts.
        clean: ``[B, ...]`` float32 latents.
        rule: how an error counts.
        process: how the samples are noised.
    """

    prompts: LatentPrompts
    prompt_row: Tensor
    clean: Tensor
    rule: MatchingRule
    process: Process

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return tuple(self.clean.shape[1:])

    def select(self, rows: Tensor) -> Self:
        """Return the given rows and the prompts they need."""
        return replace(self, **selected_prompts(self, rows), clean=self.clean[rows])

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        return replace(
            self,
            prompts=self.prompts.to(device),
            prompt_row=self.prompt_row.to(device),
            clean=self.clean.to(device),
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join samples whose errors count alike.

        Raises:
            ValueError: they do not, or their guidance scales differ.
        """
        if len({(part.rule, part.prompts.guidance_scale) for part in parts}) > 1:
            raise ValueError(
                "samples of different matching rules or guidance scales cannot be one batch: "
                + " against ".join(f"{p.rule}, guidance {p.prompts.guidance_scale}" for p in parts)
                + "."
            )
        clean = torch.cat([part.clean for part in parts])
        return replace(parts[0], **joined_prompts(parts), clean=clean)

    def distinct(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Every decision has a state of its own."""
        del steps
        place = torch.arange(len(rows), device=rows.device)
        return place, place

    def states(
        self, trajectories: Trajectories, rows: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the noised samples ``[N, ...]`` and their noise levels ``[N]``."""
        target, sigma = _drawn(trajectories, rows, steps)
        clean = self.clean[rows]
        noise = target - self.process.prediction(clean, torch.zeros_like(clean))
        return self.process.noised(clean, noise, sigma), sigma

    def decide(
        self,
        trajectories: Trajectories,
        rows: Tensor,
        steps: Tensor,
        velocity: Tensor,
        request: Request,
    ) -> Decided:
        """Compare the velocities with the targets; a divergence is (v - v')^2, mean of elements.

        Raises:
            MethodError: an entropy, or a divergence that needs a step's Gaussian, is asked for.
        """
        if request.entropy or request.divergence not in (None, "velocity"):
            asked = "an entropy" if request.entropy else f"the divergence '{request.divergence}'"
            raise MethodError(
                f"a draw on a clean sample does not have {asked}; it has the divergence 'velocity'."
            )
        log_prob = self.rule.log_prob(velocity, *_drawn(trajectories, rows, steps))
        divergence = None
        if request.divergence is not None:
            other = stored(trajectories, request.divergence_target)[rows, steps]
            divergence = ((velocity - other) ** 2).flatten(1).mean(dim=1)
        return Decided(log_prob, None, divergence, velocity)


def _drawn(trajectories: Trajectories, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The targets ``[N, ...]`` and noise levels ``[N]``."""
    if trajectories.target is None or trajectories.sigma is None:
        raise MethodError("decisions on clean samples need trajectories.target and .sigma.")
    return trajectories.target[rows, steps], trajectories.sigma[rows, steps]
