"""Qwen-Image: packed latents of a video autoencoder, a language model as the text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmgrpo.errors import ModelError
from mmgrpo.policies.flow_families.base import GuidedFamily
from mmgrpo.policies.flow_families.packing import pack, unpack

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_TOKENS = 512
"""Length of a prompt in a plain call of the pipeline; shorter ones are masked."""


class QwenImage(GuidedFamily):
    """``QwenImagePipeline``."""

    components: ClassVar[tuple[str, ...]] = (*GuidedFamily.components, "text_encoder", "tokenizer")
    uniform_grid: ClassVar[bool] = True
    patch = 2

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        config = pipe.transformer.config
        if config.guidance_embeds:
            raise ModelError(
                "A Qwen-Image transformer that embeds its guidance cannot be trained; expected one "
                "with guidance_embeds off."
            )
        self.channels = config.in_channels // 4

    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return ``text [1, L, E]``, zeros after its end, and ``text_mask [1, L]``."""
        length = max_length or DEFAULT_TOKENS
        found, _ = self.pipe.encode_prompt(text, device=device, max_sequence_length=length)
        tokens = found.shape[1]
        mask = (torch.arange(length, device=device) < tokens)[None]
        return {"text": pad(found, (0, 0, 0, length - tokens)), "text_mask": mask}

    def forward(
        self, network: nn.Module, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the velocity."""
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        mask = conditioning["text_mask"]
        longest = int(mask.sum(dim=1).max())
        out: Tensor = network(
            hidden_states=pack(latents).to(self.dtype),
            timestep=sigma,
            encoder_hidden_states=conditioning["text"][:, :longest].to(self.dtype),
            encoder_hidden_states_mask=mask[:, :longest],
            img_shapes=[[(1, rows, columns)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(out.float(), rows, columns)

    def guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Return the guided velocity, each token of it as long as the conditional one."""
        rows, columns = conditional.shape[-2] // 2, conditional.shape[-1] // 2
        combined = pack(super().guided(unconditional, conditional, guidance))
        length = pack(conditional).norm(dim=-1, keepdim=True)
        return unpack(combined * (length / combined.norm(dim=-1, keepdim=True)), rows, columns)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """Return the images of ``[N, C, h, w]`` latents: videos of one frame."""
        vae = self.pipe.vae.to(latents.device)
        mean, std = self._standard(latents.device)
        video = (latents.unsqueeze(2) * std + mean).to(vae.dtype)
        pixels = vae.decode(video, return_dict=False)[0][:, :, 0]
        images: list[Image] = self.pipe.image_processor.postprocess(pixels.float())
        return images

    @torch.no_grad()
    def from_images(
        self, images: Sequence[Image], *, height: int, width: int, device: torch.device
    ) -> Tensor:
        """Return the ``[N, C, h, w]`` float32 latents of images, resized to the given pixels."""
        vae = self.pipe.vae.to(device)
        pixels = self.pipe.image_processor.preprocess(list(images), height=height, width=width)
        video = pixels.to(device, vae.dtype).unsqueeze(2)
        mean, std = self._standard(device)
        latents: Tensor = (vae.encode(video).latent_dist.mode().float() - mean) / std
        return latents.squeeze(2)

    def _standard(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[C, 1, 1, 1]`` of the autoencoder's latents."""
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values, device=device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
