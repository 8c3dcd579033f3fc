"""What the flow engine asks of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmgrpo.core.diffusion import MatchingRule, StepRule
from mmgrpo.protocols import Prompt


class FlowModel(Protocol):
    """What the engine asks of a policy."""

    family: Any
    forwards: int

    @property
    def device(self) -> torch.device:
        """Where to sample."""
        ...

    def encode(
        self,
        prompts: Sequence[Prompt],
        *,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> Any:
        """Return what guides P prompts."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: Any, prompt_row: Tensor) -> Tensor:
        """Return ``[N, ...]`` float32."""
        ...

    def payload(
        self,
        prompts: Any,
        prompt_row: Tensor,
        latents: Tensor,
        sigmas: Tensor,
        rule: StepRule,
        *,
        owner: Tensor | None = None,
    ) -> Any:
        """Bind the states to their prompts, to how they were sampled and to who shares them."""
        ...

    def matching_payload(
        self, prompts: Any, prompt_row: Tensor, clean: Tensor, rule: MatchingRule
    ) -> Any:
        """Bind clean latents, which are noised again, to their prompts."""
        ...
