"""FLUX.1 Kontext: an image is edited; its tokens stand behind those of the image being drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mmgrpo.policies.flow_families.flux import Flux, positions
from mmgrpo.policies.flow_families.packing import pack


class FluxKontext(Flux):
    """``FluxKontextPipeline``."""

    edits: ClassVar[bool] = True

    def tokens(self, latents: Tensor, conditioning: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the tokens of the latents and of the image to edit."""
        image = conditioning["image"].to(latents.dtype)
        places = [positions(latents), positions(image, image=1)]
        return torch.cat([pack(latents), pack(image)], dim=1), torch.cat(places)
