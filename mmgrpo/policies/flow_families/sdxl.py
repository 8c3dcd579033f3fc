"""Stable Diffusion XL: two CLIPs, a pooled vector and the picture's size as further conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmgrpo.errors import ModelError
from mmgrpo.policies.flow_families.diffusion import DiffusionFamily


class SDXL(DiffusionFamily):
    """``StableDiffusionXLPipeline``."""

    components: ClassVar[tuple[str, ...]] = (
        *DiffusionFamily.components, "text_encoder_2", "tokenizer_2",
    )  # fmt: skip

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if getattr(pipe.vae.config, "latents_mean", None) is not None:
            raise ModelError(
                "The VAE standardises its latents (latents_mean); expected plain ones."
            )
        self._empty_is_zero = bool(pipe.config.get("force_zeros_for_empty_prompt"))

    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return ``text [1, L, E]`` and ``pooled [1, E']``.

        Zeros for the empty prompt where the pipeline's configuration says so, as it does itself.
        """
        del max_length
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not text and self._empty_is_zero:
            embeddings, pooled = torch.zeros_like(embeddings), torch.zeros_like(pooled)
        return {"text": embeddings, "pooled": pooled}

    def added(
        self, latents: Tensor, conditioning: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Return the pooled text and (original size, corner of the crop, size): uncropped."""
        height, width = (side * self.scale for side in latents.shape[2:])
        sizes = latents.new_tensor([height, width, 0, 0, height, width]).to(self.dtype)
        return {
            "text_embeds": conditioning["pooled"].to(self.dtype),
            "time_ids": sizes.expand(len(latents), -1),
        }
