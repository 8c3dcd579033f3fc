"""Wan 2.1 text-to-video: latents with a time axis, a UMT5 prompt, real guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.policies.flow_families.base import GuidedFamily

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_TOKENS = 512
"""Length of a prompt in a plain call of the pipeline; the rest is zeros that the network sees."""
DEFAULT_FRAMES = 81
DECODED_PIXELS = 2**22
"""Pixels of all frames of one decoder call; its activations take a hundred times their size."""


class Wan(GuidedFamily):
    """``WanPipeline``."""

    modality: ClassVar[str] = "video"
    components: ClassVar[tuple[str, ...]] = (*GuidedFamily.components, "text_encoder", "tokenizer")
    lora_targets: ClassVar[tuple[str, ...]] = tuple(
        f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")
    )

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        second = getattr(pipe, "transformer_2", None)
        if second is not None or pipe.config.get("expand_timesteps"):
            raise ModelError(
                "A Wan pipeline with a second transformer or with timesteps of its own for every "
                "token (Wan 2.2) cannot be trained; expected Wan 2.1."
            )
        self.patch = max(pipe.transformer.config.patch_size[1:])
        self.channels = pipe.transformer.config.in_channels

    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return ``text [1, L, E]`` of the UMT5, zeros after the end of the prompt."""
        embeddings, _ = self.pipe.encode_prompt(
            text,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_length or DEFAULT_TOKENS,
        )
        return {"text": embeddings}

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along a side."""
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def default_size(self) -> int:
        """The shorter side of what Wan 2.1 was made for, in pixels."""
        return 480

    def latent_shape(
        self, height: int, width: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """Return (C, f, h, w) of a video of the given size; None takes about 81 frames.

        Raises:
            ConfigError: the size is no multiple of the latent patch, or the frames do not fit.
        """
        unit = self.pipe.vae_scale_factor_temporal
        num_frames = num_frames or (DEFAULT_FRAMES - 1) // unit * unit + 1
        whole, rest = divmod(num_frames - 1, unit)
        if rest or whole < 0:
            nearest = max(round((num_frames - 1) / unit), 0) * unit + 1
            raise ConfigError(
                f"num_frames must be a multiple of {unit} plus 1 for this model; got {num_frames}, "
                f"nearest {nearest}."
            )
        channels, rows, columns = super().latent_shape(height, width)
        return channels, whole + 1, rows, columns

    def forward(
        self, network: nn.Module, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the velocity ``[N, C, f, h, w]``."""
        out: Tensor = network(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning["text"].to(self.dtype),
            return_dict=False,
        )[0]
        return out.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[list[Image]]:
        """Return the frames of each of ``[N, C, f, h, w]`` latents, which are standardised."""
        vae = self.pipe.vae.to(latents.device)
        mean, std = (
            torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        clips = (latents * std + mean).to(vae.dtype)
        frames = (latents.shape[2] - 1) * self.pipe.vae_scale_factor_temporal + 1
        pixels = frames * latents[0, 0, 0].numel() * self.scale**2
        videos: list[list[Image]] = []
        for part in clips.split(max(1, DECODED_PIXELS // pixels)):
            decoded = vae.decode(part, return_dict=False)[0].float()
            videos += self.pipe.video_processor.postprocess_video(decoded, output_type="pil")
        return videos
