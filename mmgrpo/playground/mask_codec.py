"""Training the mask codec of the playground on the masks of single digits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mmgrpo.core.mask_codec import MaskCodec, MaskCodecConfig

BCE_WEIGHT, DICE_WEIGHT = 2.0, 0.5
"""Weights of the tokenizer's two losses (ALTo, arXiv:2505.16495)."""


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Weighted sum of binary cross-entropy and dice loss, both ``[B, H, W]`` -> scalar."""
    inside = logits.sigmoid()
    overlap = 2 * (inside * masks).sum(dim=(1, 2)) + 1
    dice = 1 - overlap / (inside.sum(dim=(1, 2)) + masks.sum(dim=(1, 2)) + 1)
    bce = F.binary_cross_entropy_with_logits(logits, masks)
    return BCE_WEIGHT * bce + DICE_WEIGHT * dice.mean()


def train_codec(
    config: MaskCodecConfig,
    masks: Tensor,
    *,
    seed: int,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 6e-3,
) -> MaskCodec:
    """Trains a codec: an autoencoder, its codebooks by k-means, then the decoder on prefixes.

    Half of the steps go to the autoencoder, half to the decoder alone: there every mask is decoded
    from a prefix of its codes, of random length (nested dropout).

    Args:
        config: Its shape.
        masks: To learn, float32 ``[N, H, W]`` of 0 and 1.
        seed: Fixes weights, codebooks and prefixes.
        steps: Optimiser steps.
        batch_size: Masks per step.
        learning_rate: Peak of a one-cycle schedule, of which each half has one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = MaskCodec(config)

    def prefix(some: Tensor) -> Tensor:
        with torch.no_grad():
            codes = codec.encode(some)
            draws = torch.rand(len(some), generator=generator)
            # Short prefixes are the hard ones: half of them have at most a quarter of the codes.
            counts = (draws**2 * config.num_slots).long() + 1
            return codec.look_up(codes, counts)

    optimise = [codec.parameters(), codec.decoder.parameters()]
    for stage, (parameters, latents) in enumerate(
        zip(optimise, (codec.embed, prefix), strict=True)
    ):
        if stage == 1:
            _fit_codebooks(codec, masks[:4096], generator)
        optimizer = torch.optim.AdamW([*parameters], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=learning_rate, total_steps=max(2, steps // 2), pct_start=0.1
        )
        for _ in range(max(1, steps // 2)):
            some = masks[torch.randint(len(masks), (batch_size,), generator=generator)]
            loss = mask_loss(codec.logits(latents(some)), some)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    # What is saved in half precision is what made the demonstrations.
    return codec.half().float().requires_grad_(False).eval()


@torch.no_grad()
def _fit_codebooks(
    codec: MaskCodec, masks: Tensor, generator: torch.Generator, rounds: int = 8
) -> None:
    """Puts each slot's codebook at the k-means centres of what the slots before it have left."""
    left = codec.embed(masks)
    for book in codec.codebooks:
        centres = left[torch.randperm(len(left), generator=generator)[: len(book)]].clone()
        for _ in range(rounds):
            owner = torch.cdist(left, centres).argmin(dim=1)
            counts = torch.bincount(owner, minlength=len(book))
            sums = torch.zeros_like(centres).index_add_(0, owner, left)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        book.copy_(centres)
        left = left - centres[torch.cdist(left, centres).argmin(dim=1)]


def save_codec(folder: Path, codec: MaskCodec) -> None:
    """Writes ``config.json`` and ``model.safetensors``, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(asdict(codec.config), indent=2)
    (folder / "config.json").write_text(document + "\n", encoding="utf-8")
    weights = {name: value.half() for name, value in codec.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
