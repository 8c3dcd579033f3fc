"""Training of the small residual quantiser: a canvas of two digits becomes 1 + 2 + 8 + 32 codes.

An autoencoder is trained first without codes; k-means on what is left over at each scale makes the
codebook, so that no entry is wasted; then everything is trained together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgrpo.policies.scale_quantiser import ScaleQuantiser

Draw = Callable[[int], Tensor]
"""Returns that many gray canvases, ``[B, 1, h, w]`` in [-1, 1]."""


def train_quantiser(
    quantiser: ScaleQuantiser,
    draw: Draw,
    *,
    seed: int,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    commitment: float = 0.25,
) -> None:
    """Trains the quantiser in place: a third of the steps without codes, the rest with them.

    Args:
        quantiser: Untrained.
        draw: Gives the canvases.
        seed: Fixes the codebook's start.
        steps: Optimiser steps.
        batch_size: Canvases per step.
        learning_rate: Peak of a one-cycle schedule.
        commitment: Weight of the term that draws the latent to its codes (arXiv:1711.00937).
    """
    optimizer = torch.optim.AdamW(quantiser.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.2
    )
    for step in range(steps):
        if step == steps // 3:
            spread_codes(quantiser, draw(16 * batch_size), seed)
        pictures = draw(batch_size).expand(-1, 3, -1, -1)
        loss = _loss(quantiser, pictures, commitment if step >= steps // 3 else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    quantiser.requires_grad_(False).eval()


def _loss(quantiser: ScaleQuantiser, pictures: Tensor, commitment: float | None) -> Tensor:
    """Error of the picture and, with codes, of every scale's sum; a scalar."""
    latent = quantiser.encoder(pictures)
    if commitment is None:
        return F.mse_loss(quantiser.decoder(latent), pictures)
    totals = [total for _, _, total in quantiser.residuals(latent)]
    fit = sum(
        F.mse_loss(total, latent.detach()) + commitment * F.mse_loss(latent, total.detach())
        for total in totals
    )
    through = latent + (totals[-1] - latent).detach()
    return F.mse_loss(quantiser.decoder(through), pictures) + fit / len(totals)


@torch.no_grad()
def spread_codes(quantiser: ScaleQuantiser, canvases: Tensor, seed: int, rounds: int = 10) -> None:
    """Puts the codebook at the k-means centres of what the scales quantise, each scale alike."""
    latent = quantiser.encoder(canvases.expand(-1, 3, -1, -1))
    generator = torch.Generator().manual_seed(seed)
    centres = quantiser.codebook.weight
    for _ in range(2):  # what is left over depends on the codebook, a poor one at first
        wanted = [wanted.flatten(0, 1) for wanted, _, _ in quantiser.residuals(latent)]
        share = min(map(len, wanted))
        points = torch.cat(
            [rows[torch.randperm(len(rows), generator=generator)[: 4 * share]] for rows in wanted]
        )
        centres = _k_means(points, len(quantiser.codebook.weight), rounds, generator)
        quantiser.codebook.weight.copy_(centres)


def _k_means(points: Tensor, count: int, rounds: int, generator: torch.Generator) -> Tensor:
    """``[count, C]`` centres of ``points [M, C]``."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(owner, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres
