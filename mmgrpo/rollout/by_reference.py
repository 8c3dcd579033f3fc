"""Samples that the reference draws, for methods that hold the policy to its earlier self."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from mmgrpo.protocols import Prompt, Rollout, RolloutEngine


class Referenced(Protocol):
    """A policy whose weights can be exchanged for the reference's."""

    def reference(self) -> AbstractContextManager[None]:
        """Within the context, the reference's weights answer."""
        ...


class ByReference:
    """An engine whose policy has the reference's weights while it samples."""

    def __init__(self, engine: RolloutEngine, policy: Referenced) -> None:
        self.engine = engine
        self.policy = policy
        self.room = engine.room

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
    ) -> Rollout:
        """Sample as the engine does, from the reference."""
        with self.policy.reference():
            return self.engine.generate(
                prompts, group_size=group_size, seed=seed, version=version, iteration=iteration
            )
