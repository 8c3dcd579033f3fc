"""Samples each member of a group from its own perturbation of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from mmgrpo.core.seeding import mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.protocols import Cost, Evaluation, Prompt, Rollout, RolloutEngine


class PerturbedModel(Protocol):
    """What the engine asks of a policy."""

    def perturbed(self, seed: int, member: int) -> AbstractContextManager[None]:
        """Within the context, the weights are perturbed."""
        ...

    def evaluate(self, trajectories: Trajectories) -> Evaluation:
        """Return the log-probability of the perturbations."""
        ...


class PerturbedEngine:
    """Wraps an engine: member i of every group is drawn with the weights theta + scale xi_i.

    All prompts of a rollout share the perturbations, on every rank, and the members of a group
    share the inner engine's random numbers: what tells them apart is the perturbation alone.

    Args:
        inner: the engine that samples.
        policy: perturbs its weights.
        payload: makes the payload of rows named ``[B, 2]`` (seed, member).
    """

    def __init__(
        self, inner: RolloutEngine, policy: PerturbedModel, payload: Callable[[Tensor], Any]
    ) -> None:
        self.inner = inner
        self.policy = policy
        self.payload = payload
        self.room = inner.room

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
    ) -> Rollout:
        """Draw one sample per prompt and perturbation; a row has one decision, the perturbation."""
        drawn = []
        for member in range(group_size):
            with self.policy.perturbed(mix_seed(seed), member):
                drawn.append(
                    self.inner.generate(
                        prompts, group_size=1, seed=seed, version=version, iteration=iteration
                    )
                )
        samples = [one.samples[row] for row in range(len(prompts)) for one in drawn]
        group = torch.stack([one.trajectories.group for one in drawn], dim=1).flatten()
        members = torch.arange(group_size, device=group.device).repeat(len(prompts))
        names = torch.stack([torch.full_like(members, mix_seed(seed)), members], dim=1)
        trajectories = Trajectories(
            group=group,
            mask=torch.ones(len(group), 1, dtype=torch.bool, device=group.device),
            version=torch.full_like(group, version),
            payload=self.payload(names),
        )
        log_prob = self.policy.evaluate(trajectories).log_prob
        forwards = sum(one.cost.forwards for one in drawn)
        return Rollout(
            trajectories.replace(old_log_prob=log_prob),
            samples,
            Cost(forwards=forwards, decisions=len(group)),
        )
