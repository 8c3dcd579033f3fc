"""Stable Diffusion 3 and 3.5: joint attention, two CLIPs, an optional T5, real guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError
from mmgrpo.policies.flow_families.base import GuidedFamily


class SD3(GuidedFamily):
    """``StableDiffusion3Pipeline``."""

    components: ClassVar[tuple[str, ...]] = (
        *GuidedFamily.components, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
    )  # fmt: skip

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.patch = pipe.transformer.config.patch_size
        self.channels = pipe.transformer.config.in_channels
        self._largest = pipe.transformer.config.pos_embed_max_size * self.patch

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return (C, h, w); the position table also limits the size."""
        shape = super().latent_shape(height, width)
        if max(shape[1:]) > self._largest:
            raise ConfigError(
                "The image may measure at most "
                f"{self._largest * self.scale} pixels for this model; "
                f"got {height} x {width}."
            )
        return shape

    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return ``text [1, L, E]`` and ``pooled [1, E']``; without a T5 its tokens are zeros.

        A transformer whose text width leaves no room for a T5 was made without one and gets no
        such tokens.
        """
        if max_length is None and self._made_without_t5():
            max_length = 0
        length = {} if max_length is None else {"max_sequence_length": max_length}
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            text, text, text, device=device, do_classifier_free_guidance=False, **length
        )
        return {"text": embeddings, "pooled": pooled}

    def _made_without_t5(self) -> bool:
        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2)
        clip_width = sum(encoder.config.hidden_size for encoder in encoders)
        width: int = self.pipe.transformer.config.joint_attention_dim
        return self.pipe.text_encoder_3 is None and width == clip_width

    def forward(
        self, network: nn.Module, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the velocity."""
        out: Tensor = network(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning["text"].to(self.dtype),
            pooled_projections=conditioning["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return out.float()
