"""Stable Diffusion 1 and 2: one CLIP, a UNet that predicts noise (or v)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.policies.flow_families.diffusion import DiffusionFamily


class SD15(DiffusionFamily):
    """``StableDiffusionPipeline``."""

    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return ``text [1, L, E]``."""
        del max_length
        embeddings, _ = self.pipe.encode_prompt(
            text, device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": embeddings}
