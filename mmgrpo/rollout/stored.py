"""Groups that hold images of the data set: preferences somebody else has stated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.protocols import Cost, Prompt, Rollout, RolloutEngine, Sample
from mmgrpo.rollout.flow import FlowEngine
from mmgrpo.rollout.matching import draw_matching

Load = Callable[[Prompt, str], Any]
"""(prompt, column) -> the RGB image that the row names there."""


class StoredEngine:
    """Puts the data's preferred image first in every group, and pairs it with all others.

    The others are the data's rejected image, or, without one, samples of another engine. A stored
    image is noised as a drawn one would be that ended in the same latent.
    """

    room = 0

    def __init__(
        self,
        flow: FlowEngine,
        load: Load,
        *,
        preferred: str,
        rejected: str | None = None,
        drawn: RolloutEngine | None = None,
    ) -> None:
        """Fix where the images come from.

        Args:
            flow: knows the model, the size and how clean samples are noised.
            load: opens an image of a row.
            preferred: column of the preferred image.
            rejected: column of the rejected image; None lets ``drawn`` sample the others.
            drawn: None takes ``flow``.

        Raises:
            ConfigError: the method trains on denoising steps, which a stored image does not have.
        """
        if not flow.matching.on:
            raise ConfigError(
                "data.preferred_column: images of the data have no denoising steps; use a method "
                "with rollout.matching, such as diffusion-dpo or seppo."
            )
        self.flow, self.load = flow, load
        self.columns = [preferred] if rejected is None else [preferred, rejected]
        self.drawn: RolloutEngine = flow if drawn is None else drawn

    def check(self, group_size: int) -> None:
        """Refuse a group of another size than its images.

        Raises:
            ConfigError: says what fits.
        """
        if group_size != 2 and (len(self.columns) == 2 or group_size < 2):
            raise ConfigError(
                f"rollout.group_size is {group_size}; a preferred and a rejected image are a group "
                "of 2, a preferred image and samples one of at least 2."
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
    ) -> Rollout:
        """Return the stored images of each prompt and, after them, what else its group has.

        Raises:
            ConfigError: a group of another size than its images.
            DataError: an image that cannot be read.
        """
        self.check(group_size)
        others = group_size - len(self.columns)
        parts = [self._stored(prompts, seed, version)]
        if others:
            parts.append(
                self.drawn.generate(
                    prompts, group_size=others, seed=seed, version=version, iteration=iteration
                )
            )
        return _grouped(parts, prompts, group_size)

    def _stored(self, prompts: Sequence[Prompt], seed: int, version: int) -> Rollout:
        policy, device = self.flow.policy, self.flow.policy.device
        samples = [
            Sample(prompt, image=self.load(prompt, column))
            for prompt in prompts
            for column in self.columns
        ]
        count = len(self.columns)
        names = [(seed, prompt.index, k) for prompt in prompts for k in range(count)]
        clean = policy.family.from_images(
            [sample.image for sample in samples],
            height=self.flow.height,
            width=self.flow.width,
            device=device,
        )
        rule = self.flow.matching
        target, sigma = draw_matching(clean, names, rule, self.flow.sigmas, policy.family)
        group = torch.tensor([index for _, index, _ in names], device=device)
        trajectories = Trajectories(
            group=group,
            mask=torch.ones_like(sigma, dtype=torch.bool),
            version=torch.full_like(group, version),
            target=target,
            sigma=sigma,
            payload=policy.matching_payload(
                policy.encode(prompts, guidance_scale=self.flow.guidance_scale),
                torch.arange(len(prompts), device=device).repeat_interleave(count),
                clean,
                rule,
            ),
        )
        return Rollout(trajectories, samples, Cost())


def _grouped(parts: Sequence[Rollout], prompts: Sequence[Prompt], size: int) -> Rollout:
    """Bring the rows of each prompt together, in the order of the parts, and pair the first."""
    joined = Trajectories.cat([part.trajectories for part in parts])
    samples = [sample for part in parts for sample in part.samples]
    place = {prompt.index: number for number, prompt in enumerate(prompts)}
    where = torch.tensor([place[index] for index in joined.group.tolist()])
    order = where.argsort(stable=True)
    device = joined.group.device
    return Rollout(
        joined.select(order.to(device)).replace(pairs=_first_with_all(len(prompts), size, device)),
        [samples[row] for row in order.tolist()],
        sum((part.cost for part in parts), Cost()),
    )


def _first_with_all(groups: int, size: int, device: torch.device) -> Tensor:
    """``[groups (size - 1), 2]`` rows."""
    first = (torch.arange(groups, device=device) * size).repeat_interleave(size - 1)
    return torch.stack([first, first + torch.arange(1, size, device=device).repeat(groups)], dim=1)
