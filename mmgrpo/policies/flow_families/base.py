"""What the families of latent flows share: sizes, schedule, guidance, decoding.

A family adds how prompts are encoded and how the transformer is called. Latents are always
``[N, C, h, w]`` float32 here, those of videos ``[N, C, f, h, w]``; a transformer that wants them
packed packs them itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmgrpo.core.diffusion import FLOW, SCHEDULES, Process, linear_shift
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


class Family(ABC):
    """A pipeline seen as a field of velocities, or of predicted noise, over latents.

    Attributes:
        process: how its clean samples are noised, and what the network predicts.
        denoiser: name of the network in the pipeline.
        modality: what it draws: ``image`` or ``video``, also the name of a sample's field.
        edits: it takes an image beside the text, whose latents its conditioning has as ``image``.
        components: what the pipeline must have.
        uniform_grid: the pipeline hands its scheduler the grid 1 .. 1/N.
        patch: side of the square of latent pixels that makes one token.
        channels: channels of the latents.
        final_sigma: noise level at which a schedule ends.
        dtype: of the network's weights.
    """

    process: ClassVar[Process] = FLOW
    denoiser: ClassVar[str] = "transformer"
    modality: ClassVar[str] = "image"
    edits: ClassVar[bool] = False
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    uniform_grid: ClassVar[bool] = False
    patch: int
    channels: int
    final_sigma = 0.0

    def __init__(self, pipe: Any) -> None:
        for name in self.components:
            if getattr(pipe, name, None) is None:
                expected = ", ".join(self.components)
                raise ModelError(f"The {type(pipe).__name__} has no {name}; expected {expected}.")
        self.check_scheduler(pipe.scheduler)
        self.pipe = pipe
        self.dtype: torch.dtype = self.network.dtype

    @property
    def network(self) -> Any:
        """The pipeline's network, the part that trains."""
        return getattr(self.pipe, self.denoiser)

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse the scheduler of a model that predicts something else; raises ModelError."""
        _check_scheduler(scheduler)

    def check_prompt_length(self, max_length: int | None) -> None:
        """Refuse a length that prompts of this model cannot have; raises ConfigError."""
        del max_length  # any will do

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return ``[N, ...]``: clean latents at noise levels ``[N]``, as the model was trained."""
        return self.process.noised(clean, noise, sigma)

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return ``[N, ...]``: what :meth:`velocity` should answer there."""
        del sigma
        return self.process.prediction(clean, noise)

    def nearest_level(self, sigma: Tensor) -> Tensor:
        """Return the noise levels ``[N]`` nearest to ``sigma`` that the network was trained at."""
        return sigma

    def encode(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Return name -> ``[1, ...]`` embeddings of one prompt; None takes the model's length."""
        for encoder in self.text_encoders:
            encoder.to(device)
        return self.embed(text, device=device, max_length=max_length)

    @abstractmethod
    def embed(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Do what :meth:`encode` promises, with the text encoders in place."""

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The pipeline's text encoders."""
        parts = self.pipe.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and part]

    @abstractmethod
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
        """Return ``[N, C, h, w]`` float32, guided: a velocity, or the noise for diffusion models.

        One call of the network.

        Args:
            network: the pipeline's network, with or without adapters and wrappers.
            latents: ``[N, C, h, w]``.
            sigma: ``[N]``.
            conditioning: name -> ``[N, ...]``.
            guidance: guidance scale.
            negative: name -> ``[1, ...]`` where :meth:`needs_negative` says so.
        """

    @abstractmethod
    def needs_negative(self, guidance: float) -> bool:
        """Whether guidance of that scale takes a second, negative prompt.

        Raises:
            ConfigError: the model has no guidance of that scale.
        """

    def present_targets(self) -> list[str]:
        """Return the default LoRA targets that this network has."""
        names = [f".{name}" for name, _ in self.network.named_modules()]
        return [t for t in self.lora_targets if any(name.endswith(f".{t}") for name in names)]

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along a side."""
        return int(self.pipe.vae_scale_factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return (C, h, w) of an image of the given size in pixels.

        Raises:
            ConfigError: the size is no multiple of the latent patch.
        """
        unit = self.scale * self.patch
        if height < unit or width < unit or height % unit or width % unit:
            raise ConfigError(
                f"The {self.modality} size must be a multiple of {unit} pixels for this model; got "
                f"{height} x {width}, nearest {_rounded(height, unit)} x {_rounded(width, unit)}."
            )
        return self.channels, height // self.scale, width // self.scale

    @property
    def default_size(self) -> int:
        """Side of the square image that the model was made for, in pixels."""
        return int(self.pipe.default_sample_size * self.scale)

    def schedule(self, num_steps: int, *, height: int, width: int) -> Tensor:
        """Return ``[num_steps + 1]`` float32: the noise levels the pipeline itself would use.

        Raises:
            ModelError: the scheduler's configuration asks for something unsupported.
        """
        *_, rows, columns = self.latent_shape(height, width)
        tokens = (rows // self.patch) * (columns // self.patch)
        scheduler = self.pipe.scheduler
        try:
            return SCHEDULES[type(scheduler).__name__](
                scheduler.config, num_steps, num_tokens=tokens, uniform=self.uniform_grid
            )
        except ValueError as error:
            raise ModelError(f"The pipeline's schedule cannot be used: {error}") from error

    def shifted(self, num_steps: int, shift: float) -> Tensor:
        """Return ``[num_steps + 1]``: a uniform schedule with a static shift towards noise.

        Raises:
            ConfigError: the model has no such schedules.
        """
        return linear_shift(num_steps, shift=shift)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Sequence[Image | Sequence[Image]]:
        """Return the images of ``[N, C, h, w]`` latents, or the frames of each video."""
        vae = self.pipe.vae.to(latents.device)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        pixels = vae.decode(scaled, return_dict=False)[0]
        images: list[Image] = self.pipe.image_processor.postprocess(pixels.float())
        return images

    @torch.no_grad()
    def from_images(
        self, images: Sequence[Image], *, height: int, width: int, device: torch.device
    ) -> Tensor:
        """Return the ``[N, C, h, w]`` float32 latents of images, resized to the given pixels.

        The autoencoder's most likely latent, so that an image has one and the same every time.

        Raises:
            ModelError: a model of something else than images.
        """
        if self.modality != "image":
            raise ModelError(f"images have no latents in a model that draws {self.modality}s.")
        vae = self.pipe.vae.to(device)
        pixels = self.pipe.image_processor.preprocess(list(images), height=height, width=width)
        found = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode().float()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (found - shift) * vae.config.scaling_factor
        return latents


class GuidedFamily(Family):
    """A family whose guidance compares with a negative prompt (arXiv:2207.12598)."""

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
        """Return the guided prediction; both halves run in one batch."""
        if negative is None:
            return self.forward(network, latents, sigma, conditioning)
        both = {
            name: torch.cat([negative[name].expand_as(value), value])
            for name, value in conditioning.items()
        }
        out = self.forward(network, torch.cat([latents] * 2), torch.cat([sigma] * 2), both)
        unconditional, conditional = out.chunk(2)
        return self.guided(unconditional, conditional, guidance)

    def guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Return the guided prediction of the two halves."""
        return unconditional + guidance * (conditional - unconditional)

    @abstractmethod
    def forward(
        self, network: nn.Module, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the prediction without guidance; arguments as of :meth:`velocity`."""

    def needs_negative(self, guidance: float) -> bool:
        """Whether guidance takes a second, negative prompt, as it does above 1.

        Raises:
            ConfigError: the model has no guidance of that scale.
        """
        if guidance < 1:
            raise ConfigError(f"guidance_scale must be at least 1 (1: none); got {guidance}.")
        return guidance > 1


def _check_scheduler(scheduler: Any) -> None:
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    name = type(scheduler).__name__
    if name not in SCHEDULES or kind != "flow_prediction":
        raise ModelError(
            "A flow policy needs a model that predicts velocities, with a "
            f"{' or '.join(SCHEDULES)}; this pipeline has a {name} (prediction type {kind})."
        )


def _rounded(pixels: int, unit: int) -> int:
    return max(round(pixels / unit), 1) * unit
