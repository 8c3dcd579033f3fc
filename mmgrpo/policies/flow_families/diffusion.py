"""Models that predict noise: the discrete schedule of a UNet, and DDIM's levels from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmgrpo.core.diffusion import DIFFUSION, Process
from mmgrpo.errors import ConfigError, ModelError, nearest
from mmgrpo.policies.flow_families.base import GuidedFamily

PREDICTIONS = ("epsilon", "v_prediction")
"""What the network may predict; v (arXiv:2202.00512) is turned into noise."""
SPACINGS = ("leading", "trailing", "linspace")
UNSUPPORTED = ("clip_sample", "thresholding", "use_karras_sigmas", "use_beta_sigmas")
"""Options that would change a scheduler's steps."""


class DiffusionFamily(GuidedFamily):
    """A variance-preserving latent diffusion model with a UNet.

    Whatever sampler the pipeline brings, the steps are DDIM's on its timesteps, as in DDPO's
    program. A timestep is an integer and is looked up, never computed from a rounded noise level.

    Attributes:
        levels: ``[T]`` float32 noise level of each training timestep, rising.
    """

    process: ClassVar[Process] = DIFFUSION
    denoiser: ClassVar[str] = "unet"
    components: ClassVar[tuple[str, ...]] = (
        "unet", "vae", "scheduler", "text_encoder", "tokenizer",
    )  # fmt: skip
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 1

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ModelError(
                "This UNet takes the guidance scale as an input (a consistency model); expected "
                "one that is guided by a negative prompt."
            )
        self.channels: int = pipe.unet.config.in_channels
        self._ddim = _ddim_of(pipe.scheduler)
        self._predicts_v = self._ddim.config.prediction_type == "v_prediction"
        self.levels = _level(self._ddim.alphas_cumprod)
        self._between = (self.levels[:-1] + self.levels[1:]) / 2
        self.final_sigma = _level(self._ddim.final_alpha_cumprod).item()

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse a scheduler of another kind of model, or one that changes DDIM's steps."""
        kind, name = scheduler.config.get("prediction_type", "epsilon"), type(scheduler).__name__
        if kind not in PREDICTIONS or name.startswith("FlowMatch"):
            raise ModelError(
                f"unsupported scheduler prediction type '{kind}' of {name}; expected "
                f"{' or '.join(PREDICTIONS)} of a diffusion model."
            )
        for option in UNSUPPORTED:
            if scheduler.config.get(option):
                raise ModelError(f"scheduler option {option} is not supported; expected it off.")

    def check_prompt_length(self, max_length: int | None) -> None:
        """Refuse any: prompts have the length of the CLIP."""
        if max_length is not None:
            raise ConfigError(
                "max_prompt_tokens is the length of a T5, and this model has none; "
                f"expected null, got {max_length}."
            )

    @property
    def default_size(self) -> int:
        """Side of the square image that the model was made for, in pixels."""
        return int(self.pipe.unet.config.sample_size * self.scale)

    def schedule(self, num_steps: int, *, height: int, width: int) -> Tensor:
        """Return the noise levels of DDIM's timesteps, and the one at which it ends.

        Raises:
            ModelError: the scheduler has no such schedule.
        """
        del height, width
        try:
            self._ddim.set_timesteps(num_steps)
            steps = self.levels[self._ddim.timesteps]
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise ModelError(
                f"The pipeline's schedule has no {num_steps} steps: {error}"
            ) from error
        sigmas = torch.cat([steps, steps.new_tensor([self.final_sigma])])
        if sigmas[0] >= 1 or not bool((sigmas.diff() < 0).all()):
            raise ModelError(
                "The pipeline's schedule cannot be used: noise levels must fall from below 1; got "
                f"{[round(value, 4) for value in sigmas.tolist()]}."
            )
        return sigmas

    def shifted(self, num_steps: int, shift: float) -> Tensor:
        """Refuse: the network knows the noise levels of its timesteps only."""
        del num_steps
        raise ConfigError(
            f"shift is for flow models, and this is {self.process.name}; got {shift}."
        )

    def nearest_level(self, sigma: Tensor) -> Tensor:
        """Return the noise levels ``[N]`` of the nearest timesteps."""
        return self.levels.to(sigma.device)[self.timesteps(sigma)]

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Return ``[N]`` int64: the training timesteps whose noise levels are nearest."""
        return torch.bucketize(sigma.contiguous(), self._between.to(sigma.device))

    def forward(
        self, network: nn.Module, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the predicted noise."""
        out: Tensor = network(
            latents.to(self.dtype),
            self.timesteps(sigma),
            encoder_hidden_states=conditioning["text"].to(self.dtype),
            added_cond_kwargs=self.added(latents, conditioning),
            return_dict=False,
        )[0]
        if not self._predicts_v:
            return out.float()
        level = sigma.view(-1, 1, 1, 1)
        return self.process.signal(level) * out.float() + level * latents

    def added(
        self, latents: Tensor, conditioning: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Return what else the UNet is conditioned on, by its own names."""
        del latents, conditioning
        return None


def _ddim_of(scheduler: Any) -> Any:
    """The noise schedule and timesteps of a pipeline, as a DDIM scheduler."""
    from diffusers import DDIMScheduler

    spacing = scheduler.config.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise ModelError(
            f"unknown scheduler timestep_spacing '{spacing}'{nearest(spacing, SPACINGS)}"
        )
    return DDIMScheduler.from_config(scheduler.config)


def _level(alpha_bar: Tensor) -> Tensor:
    return (1 - alpha_bar.double()).sqrt().float()
