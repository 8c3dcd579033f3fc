"""What a token policy needs to evaluate completions again: unique prompts, rows that point to them.

Shapes: P unique prompts of up to Lp tokens, padded on the left; B rows of T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt of L tokens.

    Attributes:
        ids: ``[L]`` int64.
        aligned: name -> ``[L]`` further per-token inputs of the model (token types).
        features: name -> tensor whose first dimension lists parts of images, whatever the
            processor made (pixel values, grids).
    """

    ids: Tensor
    aligned: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenPrompts:
    """Unique prompts, each stored once.

    Attributes:
        ids: ``[P, Lp]`` int64.
        mask: ``[P, Lp]`` bool, off on the padding.
        aligned: name -> ``[P, Lp]``, zero on the padding.
        features: one dict per prompt, see :class:`EncodedPrompt`.
    """

    ids: Tensor
    mask: Tensor
    aligned: dict[str, Tensor]
    features: tuple[dict[str, Tensor], ...]

    @classmethod
    def pad(cls, prompts: Sequence[EncodedPrompt], *, pad_id: int) -> Self:
        """Stack prompts of different lengths."""
        width = max(len(prompt.ids) for prompt in prompts)
        return cls.cat(
            [
                cls(
                    ids=_left(prompt.ids[None], width, pad_id),
                    mask=_left(torch.ones_like(prompt.ids[None], dtype=torch.bool), width),
                    aligned={n: _left(value[None], width) for n, value in prompt.aligned.items()},
                    features=(prompt.features,),
                )
                for prompt in prompts
            ]
        )

    def __len__(self) -> int:
        return self.ids.shape[0]

    def select(self, rows: Tensor) -> Self:
        """Return the given prompts (repeats allowed) without the padding common to all of them."""
        mask = self.mask[rows]
        start = self.mask.shape[1] - int(mask.sum(dim=1).max())
        return replace(
            self,
            ids=self.ids[rows, start:],
            mask=mask[:, start:],
            aligned={name: value[rows, start:] for name, value in self.aligned.items()},
            features=tuple(self.features[row] for row in rows.tolist()),
        )

    def inputs(self) -> dict[str, Tensor]:
        """Return the model's inputs beside ids and mask; features of all prompts are joined."""
        names = list(dict.fromkeys(name for features in self.features for name in features))
        joined = {
            name: torch.cat([features[name] for features in self.features if name in features])
            for name in names
        }
        return {**self.aligned, **joined}

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        return replace(
            self,
            ids=self.ids.to(device),
            mask=self.mask.to(device),
            aligned={name: value.to(device) for name, value in self.aligned.items()},
            features=tuple(
                {name: value.to(device) for name, value in features.items()}
                for features in self.features
            ),
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join, padding the shorter ones on the left."""
        width = max(part.ids.shape[1] for part in parts)
        names = sorted({name for part in parts for name in part.aligned})

        def aligned(part: Self, name: str) -> Tensor:
            return _left(part.aligned.get(name, torch.zeros_like(part.ids)), width)

        return cls(
            ids=torch.cat([_left(part.ids, width) for part in parts]),
            mask=torch.cat([_left(part.mask, width) for part in parts]),
            aligned={name: torch.cat([aligned(part, name) for part in parts]) for name in names},
            features=tuple(features for part in parts for features in part.features),
        )


@dataclass(frozen=True)
class TokenPayload:
    """Completions and the prompts they answer.

    Attributes:
        prompts: the unique prompts.
        prompt_row: ``[B]`` int64 index into the prompts.
        completion_ids: ``[B, T]`` int64; what lies after a completion's end is arbitrary.
        temperature: ``[B]`` float32, what the logits are divided by before the softmax, in the
            rollout and in every evaluation of these rows.
    """

    prompts: TokenPrompts
    prompt_row: Tensor
    completion_ids: Tensor
    temperature: Tensor

    def at(self, keep: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return ids and temperatures, ``[N]`` each, at the N positions of ``keep [B, W]``.

        Column c of ``keep`` is token ``start + c``.
        """
        ids = self.completion_ids[:, start : start + keep.shape[1]][keep]
        return ids, self.temperature[:, None].expand_as(keep)[keep]

    def select(self, rows: Tensor) -> Self:
        """Return the given rows and the prompts they need; T stays."""
        kept, prompt_row = torch.unique(self.prompt_row[rows], return_inverse=True)
        return replace(
            self,
            prompts=self.prompts.select(kept),
            prompt_row=prompt_row,
            completion_ids=self.completion_ids[rows],
            temperature=self.temperature[rows],
        )

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        return replace(
            self,
            prompts=self.prompts.to(device),
            prompt_row=self.prompt_row.to(device),
            completion_ids=self.completion_ids.to(device),
            temperature=self.temperature.to(device),
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join; shorter completions are padded on the right."""
        width = max(part.completion_ids.shape[1] for part in parts)
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part.prompts))
        return cls(
            prompts=TokenPrompts.cat([part.prompts for part in parts]),
            prompt_row=torch.cat(
                [part.prompt_row + start for part, start in zip(parts, starts, strict=False)]
            ),
            completion_ids=torch.cat([pad_right(part.completion_ids, width) for part in parts]),
            temperature=torch.cat([part.temperature for part in parts]),
        )


def pad_right(value: Tensor, width: int) -> Tensor:
    """Return ``[..., width]``: the last dimension padded with zeros at its end."""
    return torch.nn.functional.pad(value, (0, width - value.shape[-1]))


def _left(value: Tensor, width: int, fill: int = 0) -> Tensor:
    return torch.nn.functional.pad(value, (width - value.shape[-1], 0), value=fill)
