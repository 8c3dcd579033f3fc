"""FLUX.1: packed latents, rotary positions, a guidance scale that the network embeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError
from mmgrpo.policies.flow_families.base import Family
from mmgrpo.policies.flow_families.packing import pack, unpack


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
        tokens, places = self.tokens(latents, conditioning)
        out: Tensor = network(
            hidden_states=tokens.to(self.dtype),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance) if self._embeds_guidance else None,
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled"].to(self.dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=self.dtype),
            img_ids=places.to(self.dtype),
            return_dict=False,
        )[0]
        return unpack(out[:, : rows * columns].float(), rows, columns)

    def tokens(
        self,
        latents: Tensor,
        conditioning: Mapping[str, Tensor],  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return what the network reads, ``[N, L, 4 C]``, and the places ``[L, 3]`` of the tokens.

        The latents' own tokens come first.
        """
        return pack(latents), positions(latents)


def positions(latents: Tensor, *, image: int = 0) -> Tensor:
    """``[L, 3]`` float32: (image, row, column) of every token of ``[N, C, h, w]`` latents."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([torch.full_like(row, image), row, column], dim=-1).flatten(0, 1)
    return ids.to(device=latents.device, dtype=torch.float32)
