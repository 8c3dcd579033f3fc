"""FLUX.1: packed latents, rotary positions, a guidance scale that the network embeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError
from mmgrpo.policies.flow_families.base import Family


class Flux(Family):
    """``FluxPipeline``."""

    components: ClassVar[tuple[str, ...]] = (
        *Family.components, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
    )  # fmt: skip
    uniform_grid: ClassVar[bool] = True
    patch = 2

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.channels = pipe.transformer.config.in_channels // 4
        self._embeds_guidance = bool(pipe.transformer.config.guidance_embeds)

    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return ``text [1, L, E]`` of the T5 and ``pooled [1, E']`` of the CLIP."""
        length = {} if max_length is None else {"max_sequence_length": max_length}
        embeddings, pooled, _ = self.pipe.encode_prompt(text, text, device=device, **length)
        return {"text": embeddings, "pooled": pooled}

    def needs_negative(self, guidance: float) -> bool:
        """Never: the scale is an input of the network, where it has one."""
        if guidance != 1 and not self._embeds_guidance:
            raise ConfigError(
                "This FLUX model has no guidance embedding; "
                f"guidance_scale must be 1, got {guidance}."
            )
        return False

    def velocity(
        self,
        network: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Mapping[str, Tensor],
        *,
        guidance: float,
        negative: Mapping[str, Tensor] | None,  # noqa: ARG002
    ) -> Tensor:
        """Return the velocity."""
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        text = conditioning["text"].to(self.dtype)
        out: Tensor = network(
            hidden_states=pack(latents).to(self.dtype),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance) if self._embeds_guidance else None,
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled"].to(self.dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=self.dtype),
            img_ids=_positions(rows, columns, like=text),
            return_dict=False,
        )[0]
        return unpack(out.float(), rows, columns)


def pack(latents: Tensor) -> Tensor:
    """Return ``[N, h/2 w/2, 4 C]`` tokens of ``[N, C, h, w]``: each is a square of 2 x 2."""
    squares = latents.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))  # N, C, h/2, 2, w/2, 2
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Undo :func:`pack`."""
    squares = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))  # N, h/2, w/2, C, 2, 2
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _positions(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """``[rows columns, 3]``: (0, row, column) of every image token."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    return ids.to(device=like.device, dtype=like.dtype)
