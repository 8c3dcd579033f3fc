"""A small trained ``VQModel`` of diffusers: a canvas of two digits becomes 4 x 8 codes, and back.

Each code stands for 2 x 2 pixels. An autoencoder is trained first without codes; k-means on what
it encodes makes the codebook, so that no entry is wasted; then both are trained together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

GRID = (4, 8)
NUM_CODES = 64
Draw = Callable[[int], Tensor]
"""Returns that many gray canvases, ``[B, 1, 8, 16]`` in [-1, 1]."""


def build_vq(seed: int) -> VQModel:
    """Builds the untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            num_vq_embeddings=NUM_CODES,
            norm_num_groups=4,
            sample_size=16,
            mid_block_add_attention=False,
        )


def train_vq(
    draw: Draw, *, seed: int, steps: int, batch_size: int = 32, learning_rate: float = 3e-3
) -> VQModel:
    """Trains the model: a third of the steps without codes, the rest with them.

    Args:
        draw: Gives the canvases.
        seed: Fixes the initial weights and the codebook's start.
        steps: Optimiser steps.
        batch_size: Canvases per step.
        learning_rate: Peak of a one-cycle schedule.
    """
    vq = build_vq(seed).train()
    optimizer = torch.optim.AdamW(vq.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.2
    )
    for step in range(steps):
        quantised = step >= steps // 3
        if step == steps // 3:
            _spread_codes(vq, draw(16 * batch_size), seed)
        canvases = draw(batch_size).expand(-1, 3, -1, -1)
        decoded = vq.decode(vq.encode(canvases).latents, force_not_quantize=not quantised)
        loss = F.mse_loss(decoded.sample, canvases) + decoded.commit_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return vq.requires_grad_(False).eval()


@torch.no_grad()
def encode_codes(vq: VQModel, canvases: Tensor) -> Tensor:
    """Turns gray canvases ``[B, 1, 8, 16]`` into codes, int64 ``[B, 32]``, row by row."""
    latents = vq.encode(canvases.expand(-1, 3, -1, -1)).latents
    return vq.quantize(latents)[2][2].view(len(canvases), -1)


@torch.no_grad()
def _spread_codes(vq: VQModel, canvases: Tensor, seed: int, rounds: int = 10) -> None:
    """Puts the codebook at the k-means centres of the encoded canvases."""
    points = vq.encode(canvases.expand(-1, 3, -1, -1)).latents.permute(0, 2, 3, 1).flatten(0, 2)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:NUM_CODES]].clone()
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(owner, minlength=NUM_CODES)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    vq.quantize.embedding.weight.copy_(centres)
