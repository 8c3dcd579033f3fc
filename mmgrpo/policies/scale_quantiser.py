"""The residual multi-scale quantiser of a next-scale generator: pictures to codes, and back.

Shapes: B pictures, K scales of n_k codes (N in all), latents of C channels on the last scale's
grid (H, W). The maths is that of VAR (arXiv:2404.02905): every scale encodes what the scales
before it left over.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmgrpo.config.scale_shape import ScaleShape


class ScaleQuantiser(nn.Module):
    """Encoder, codebook, a correcting convolution per scale, decoder; float32 always."""

    def __init__(self, shape: ScaleShape) -> None:
        """Make an untrained quantiser."""
        super().__init__()
        self.shape = shape
        width, code_dim = shape.decoder_width, shape.code_dim
        self.encoder = nn.Sequential(_conv(3, width), nn.SiLU(), *_halvings(shape))
        self.encoder.append(_conv(width, code_dim))
        self.codebook = nn.Embedding(shape.num_codes, code_dim)
        self.corrections = nn.ModuleList(_conv(code_dim, code_dim) for _ in shape.scales)
        self.decoder = nn.Sequential(_conv(code_dim, width), nn.SiLU(), *_doublings(shape))
        self.decoder.append(_conv(width, 3))

    def contributions(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield what each complete scale of ``codes [B, m]`` adds to the latent, ``[B, C, H, W]``.

        m is the number of codes of the first scales, any number of them.
        """
        lengths, start = self.shape.lengths, 0
        for scale, length in enumerate(lengths):
            if start + length > codes.shape[1]:
                return
            yield self.contribution(self.codebook(codes[:, start : start + length]), scale)
            start += length

    def contribution(self, entries: Tensor, scale: int) -> Tensor:
        """Turn the code vectors ``[B, n_k, C]`` of a scale into its part of the latent."""
        rows, columns = self.shape.scales[scale]
        small = entries.transpose(1, 2).unflatten(2, (rows, columns))
        large = F.interpolate(small, size=tuple(self.shape.scales[-1]), mode="bicubic")
        corrected: Tensor = (large + self.corrections[scale](large)) / 2
        return corrected

    def shrink(self, latent: Tensor, scale: int) -> Tensor:
        """Average the latent ``[B, C, H, W]`` on the grid of a scale, ``[B, n_k, C]``."""
        small = F.interpolate(latent, size=tuple(self.shape.scales[scale]), mode="area")
        return small.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def inputs(self, codes: Tensor) -> Tensor:
        """Return what the transformer reads at each place, given the codes of the first scales.

        At the places of a scale that is the sum of all scales before it, on the scale's grid;
        zero at the first. The same codes give the same numbers, in the rollout and afterwards.

        Args:
            codes: ``[B, m]`` int64, the codes of the first scales.

        Returns:
            ``[B, m', C]`` float32, the places of those scales and the next, if there is one.
        """
        first = self.shape.lengths[0]
        parts = [self.codebook.weight.new_zeros(len(codes), first, self.shape.code_dim)]
        latent: Tensor | float = 0.0
        for scale, part in enumerate(self.contributions(codes), start=1):
            latent = latent + part
            if scale < len(self.shape.scales):
                parts.append(self.shrink(latent, scale))
        return torch.cat(parts, dim=1)

    def residuals(self, latent: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Quantise a latent scale by scale, each what is left over by the scales before it.

        Args:
            latent: ``[B, C, H, W]``.

        Yields:
            What is quantised, ``[B, n_k, C]``; its codes, int64 ``[B, n_k]``; and the sum of the
            scales so far, ``[B, C, H, W]``, differentiable in codebook and corrections.
        """
        target, total = latent.detach(), torch.zeros_like(latent)
        for scale in range(len(self.shape.scales)):
            wanted = self.shrink(target - total.detach(), scale)
            codes = torch.cdist(wanted, self.codebook.weight.detach()[None]).argmin(dim=2)
            total = total + self.contribution(self.codebook(codes), scale)
            yield wanted, codes, total

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Turn pictures ``[B, 3, h, w]`` in [-1, 1] into codes, int64 ``[B, N]``, coarse first."""
        return torch.cat([codes for _, codes, _ in self.residuals(self.encoder(pictures))], dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes ``[B, N]`` into pictures ``[B, 3, h, w]``, about in [-1, 1]."""
        latent: Tensor | float = 0.0
        for part in self.contributions(codes):
            latent = latent + part
        pictures: Tensor = self.decoder(latent)
        return pictures


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride=stride, padding=1)


def _halvings(shape: ScaleShape) -> Iterator[nn.Module]:
    for _ in range(shape.doublings):
        yield from (_conv(shape.decoder_width, shape.decoder_width, stride=2), nn.SiLU())
        yield from (_conv(shape.decoder_width, shape.decoder_width), nn.SiLU())


def _doublings(shape: ScaleShape) -> Iterator[nn.Module]:
    for _ in range(shape.doublings):
        yield from (_conv(shape.decoder_width, shape.decoder_width), nn.SiLU())
        yield nn.Upsample(scale_factor=2.0)
        yield from (_conv(shape.decoder_width, shape.decoder_width), nn.SiLU())
