"""What the families of latent image flows share: sizes, schedule, decoding.

A family adds how prompts are encoded and how the transformer is called. Latents are always
``[N, C, h, w]`` float32 here; a transformer that wants them packed packs them itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmgrpo.core.diffusion import from_scheduler_config
from mmgrpo.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""Attention projections of image and text tokens: Flow-GRPO's choice (arXiv:2505.05470)."""


class Family:
    """A pipeline seen as a velocity field over latents.

    Attributes:
        components: what the pipeline must have.
        uniform_grid: the pipeline hands its scheduler the grid 1 .. 1/N.
        patch: side of the square of latent pixels that makes one token.
        channels: channels of the latents.
        dtype: of the transformer's weights.
    """

    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    uniform_grid: ClassVar[bool] = False
    patch: int
    channels: int

    def __init__(self, pipe: Any) -> None:
        for name in self.components:
            if getattr(pipe, name, None) is None:
                expected = ", ".join(self.components)
                raise ModelError(f"The {type(pipe).__name__} has no {name}; expected {expected}.")
        _check_scheduler(pipe.scheduler)
        self.pipe = pipe
        self.dtype: torch.dtype = pipe.transformer.dtype

    def encode(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return name -> ``[1, ...]`` embeddings of one prompt; None takes the model's length."""
        for encoder in self.text_encoders:
            encoder.to(device)
        return self.embed(text, device=device, max_length=max_length)

    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Do what :meth:`encode` promises, with the text encoders in place."""
        raise NotImplementedError

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The pipeline's text encoders."""
        parts = self.pipe.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and part]

    def velocity(
        self,
        network: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Mapping[str, Tensor],
        *,
        guidance: float,
        negative: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Return ``[N, C, h, w]`` float32 velocity, guided; one call of the network.

        Args:
            network: the transformer, with or without adapters and wrappers.
            latents: ``[N, C, h, w]``.
            sigma: ``[N]``.
            conditioning: name -> ``[N, ...]``.
            guidance: guidance scale.
            negative: name -> ``[1, ...]`` where :meth:`needs_negative` says so.
        """
        raise NotImplementedError

    def present_targets(self) -> list[str]:
        """Return the default LoRA targets that this transformer has."""
        names = [f".{name}" for name, _ in self.pipe.transformer.named_modules()]
        return [t for t in self.lora_targets if any(name.endswith(f".{t}") for name in names)]

    def needs_negative(self, guidance: float) -> bool:
        """Whether guidance takes a second, unconditional prompt.

        Raises:
            ConfigError: the model has no guidance of that scale.
        """
        raise NotImplementedError

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of an image of the given size in pixels.

        Raises:
            ConfigError: the size is no multiple of the latent patch.
        """
        unit = self.pipe.vae_scale_factor * self.patch
        if height < unit or width < unit or height % unit or width % unit:
            raise ConfigError(
                f"The image size must be a multiple of {unit} pixels for this model; got "
                f"{height} x {width}, nearest {_rounded(height, unit)} x {_rounded(width, unit)}."
            )
        scale = self.pipe.vae_scale_factor
        return self.channels, height // scale, width // scale

    @property
    def default_size(self) -> int:
        """Side of the square image that the model was made for, in pixels."""
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    def schedule(self, num_steps: int, *, height: int, width: int) -> Tensor:
        """Return ``[num_steps + 1]`` float32: the noise levels the pipeline itself would use.

        Raises:
            ModelError: the scheduler's configuration asks for something unsupported.
        """
        _, rows, columns = self.latent_shape(height, width)
        tokens = (rows // self.patch) * (columns // self.patch)
        try:
            return from_scheduler_config(
                self.pipe.scheduler.config, num_steps, num_tokens=tokens, uniform=self.uniform_grid
            )
        except ValueError as error:
            raise ModelError(f"The pipeline's schedule cannot be used: {error}") from error

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """Return the images of ``[N, C, h, w]`` latents."""
        vae = self.pipe.vae.to(latents.device)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        pixels = vae.decode(scaled, return_dict=False)[0]
        images: list[Image] = self.pipe.image_processor.postprocess(pixels.float())
        return images


def _check_scheduler(scheduler: Any) -> None:
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    name = type(scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler" or kind != "flow_prediction":
        raise ModelError(
            "A flow policy needs a model that predicts velocities, with a "
            f"FlowMatchEulerDiscreteScheduler; this pipeline has a {name} (prediction type {kind})."
        )


def _rounded(pixels: int, unit: int) -> int:
    return max(round(pixels / unit), 1) * unit
