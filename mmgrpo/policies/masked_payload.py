"""What a masked diffusion policy needs to evaluate responses again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mmgrpo.policies.token_payload import TokenPrompts


@dataclass(frozen=True)
class MaskedPayload:
    """Responses, the prompts they answer, and the views through which they are read.

    Attributes:
        prompts: the unique prompts.
        prompt_row: ``[B]`` int64 index into the prompts.
        response_ids: ``[B, L]`` int64.
        temperature: ``[B]`` float32, what the logits are divided by before the softmax.
        hidden: ``[B, K, L]`` bool, tokens that a view hides.
        scored: ``[B, K, L]`` bool, tokens whose log-probability a view gives.
        weight: ``[B, K]`` float32 factor of a view.
        by_token: a decision is a token (T = L), else a view (T = K).
    """

    prompts: TokenPrompts
    prompt_row: Tensor
    response_ids: Tensor
    temperature: Tensor
    hidden: Tensor
    scored: Tensor
    weight: Tensor
    by_token: bool

    def decisions(self) -> Tensor:
        """``[B, T]`` bool: decisions that some view scores."""
        return self.scored.any(dim=1 if self.by_token else 2)

    def select(self, rows: Tensor) -> Self:
        """Return the given rows and the prompts they need."""
        kept, prompt_row = torch.unique(self.prompt_row[rows], return_inverse=True)
        own = {name: getattr(self, name)[rows] for name in _ROWS}
        return replace(self, prompts=self.prompts.select(kept), prompt_row=prompt_row, **own)

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        own = {name: getattr(self, name).to(device) for name in ("prompt_row", *_ROWS)}
        return replace(self, prompts=self.prompts.to(device), **own)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join responses of one length, read through as many views.

        Raises:
            ValueError: they differ; padding would be seen by a model that looks in both directions.
        """
        shapes = {part.hidden.shape[1:] for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"responses of different (views, tokens) cannot be joined: {shapes}")
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part.prompts))
        rows = zip(parts, starts, strict=False)
        return cls(
            prompts=TokenPrompts.cat([part.prompts for part in parts]),
            prompt_row=torch.cat([part.prompt_row + start for part, start in rows]),
            by_token=parts[0].by_token,
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in _ROWS},
        )


_ROWS = ("response_ids", "temperature", "hidden", "scored", "weight")
