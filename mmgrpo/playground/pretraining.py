"""Flow matching of the playground's Stable Diffusion 3 pipelines, on prompts and pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from mmgrpo.playground.flow_pretraining import Pretraining, Progress, fit, matching_loss
from mmgrpo.playground.image_model import DEFAULT_T5_TOKENS, NUM_T5_TOKENS, encode_prompts

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""From indices of prompts ``[B]`` to pictures as latents ``[B, channels, height, width]``.

The pipeline's shift and scale are not applied: where its autoencoder copies, these are pixels in
[-1, 1].
"""


def flow_matching_loss(
    transformer: SD3Transformer2DModel,
    clean: Tensor,
    states: Tensor,
    pooled: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The mean squared error of the velocity; see :func:`matching_loss`.

    Args:
        transformer: The velocity model; its timestep is 1000 times the noise level.
        clean: Latents ``[B, channels, height, width]``.
        states: Prompt token states ``[B, T, 64]``.
        pooled: Pooled prompt states ``[B, 64]``.
        generator: Source of all randomness.

    Returns:
        A scalar.
    """

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        predicted: Tensor = transformer(
            hidden_states=latents,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return predicted

    return matching_loss(velocity, clean, generator)


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    settings: Pretraining,
    prompts: list[str],
    draw: Draw,
    *,
    seed: int,
    num_t5_tokens: int = NUM_T5_TOKENS,
    progress: Progress | None = None,
) -> None:
    """Trains the pipeline's transformer in place.

    Args:
        pipeline: The pipeline; only its transformer changes.
        settings: How, and how far.
        prompts: What it is asked for; the last is the empty prompt, which nothing is drawn for.
        draw: Draws pictures for prompts.
        seed: Fixes the batches.
        num_t5_tokens: As in the design.
        progress: Receives a line of text now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    states, pooled = encode_prompts(pipeline, prompts, num_t5_tokens)
    vae, nothing = pipeline.vae.config, len(prompts) - 1

    def loss(padded: bool) -> Tensor:
        batch_size = settings.batch_size // 4 if padded else settings.batch_size
        asked = torch.randint(0, nothing, (batch_size,), generator=generator)
        clean = (draw(asked, generator) - vae.shift_factor) * vae.scaling_factor
        empty = torch.rand(batch_size, generator=generator) < settings.empty_prompt_rate
        asked = asked.masked_fill(empty, nothing)
        tokens = F.pad(states[asked], (0, 0, 0, DEFAULT_T5_TOKENS if padded else 0))
        return flow_matching_loss(pipeline.transformer, clean, tokens, pooled[asked], generator)

    fit(pipeline.transformer, loss, settings, progress=progress)
