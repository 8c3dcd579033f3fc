"""A small trained ``AutoencoderKL``: 32 x 32 coloured pixels become 4 x 4 latents, and back.

It knows nothing but clear shapes, so what the transformer draws decodes to clear shapes as well,
and verifiers of different kinds agree about it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from mmgrpo.playground.flow_pretraining import Progress
from mmgrpo.playground.shapes_drawing import Group, all_groups, compose
from mmgrpo.playground.tiny_vae import plain_autoencoder

LATENTS = (4, 4, 4)
"""Channels, height and width."""
_KL_WEIGHT = 1e-3
_POOL = 4096  # pictures of four arbitrary quarters to learn from


def build_codec(seed: int) -> AutoencoderKL:
    """Builds the untrained autoencoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return plain_autoencoder(
            (8, 8, 16, 16), latent_channels=LATENTS[0], norm_num_groups=4, sample_size=32
        )


def to_pixels(pictures: np.ndarray) -> Tensor:
    """From uint8 ``[B, H, W, 3]`` to ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0


def train_codec(
    *,
    seed: int,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    progress: Progress | None = None,
) -> AutoencoderKL:
    """Trains the autoencoder on quarters that show any shape or nothing, and sets its scale.

    Args:
        seed: Fixes weights, pictures and batches.
        steps: Optimiser steps.
        batch_size: Pictures per step.
        learning_rate: Peak of a one-cycle schedule.
        progress: Receives a line of text now and then.

    Returns:
        The autoencoder, frozen. Its shift and scale make latents of the training pictures have
        mean 0 and variance 1.
    """
    pool = _pool(np.random.default_rng(seed))
    codec = build_codec(seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(codec.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.2
    )
    for step in range(steps):
        pictures = pool[torch.randint(_POOL, (batch_size,), generator=generator)]
        latents = codec.encode(pictures).latent_dist
        decoded = codec.decode(latents.sample(generator)).sample
        error = F.mse_loss(decoded, pictures)
        loss = error + _KL_WEIGHT * latents.kl().mean() / latents.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress and (step + 1) % 100 == 0:
            progress(f"codec: step {step + 1}/{steps}, squared error {error.item():.4f}")
    codec.requires_grad_(False).eval()
    means = codec.encode(pool[:1024]).latent_dist.mean
    shift, scale = means.mean().item(), 1 / means.std().item()
    codec.register_to_config(shift_factor=round(shift, 3), scaling_factor=round(scale, 3))
    return codec


def _pool(rng: np.random.Generator) -> Tensor:
    """Draws what to learn from: ``[N, 3, 32, 32]``, each quarter any shape or nothing."""
    contents: list[Group | None] = [None, *all_groups()]
    choices = rng.integers(len(contents), size=(_POOL, 4))
    return to_pixels(np.stack([compose([contents[k] for k in four]) for four in choices]))


def encode(codec: AutoencoderKL, pictures: np.ndarray, batch_size: int = 256) -> Tensor:
    """Encodes uint8 ``[B, 32, 32, 3]`` to ``[B, 4, 4, 4]``, without the shift and scale."""
    parts = to_pixels(pictures).split(batch_size)
    return torch.cat([codec.encode(part).latent_dist.mean for part in parts])
