"""Binary masks as sequences of codes, coarse to fine: any prefix of a sequence is a mask.

A mask is encoded into one latent vector, and the vector into codes by residual quantisation: the
code of slot j is the entry of codebook j nearest to what the slots before it have left. The sum of
the entries is decoded. So one code is a rough mask and each further one refines it, which is what
a tokenizer of adaptive length needs (ALTo, arXiv:2505.16495; the nested order of the slots is that
of residual quantisation, the network is ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MaskCodecConfig:
    """Shape of a :class:`MaskCodec`, and how its codes are written in text.

    Attributes:
        canvas: height and width of a mask in pixels.
        stride: pixels per cell of the grid that the networks see, in both directions.
        num_codes: entries of each slot's codebook.
        num_slots: most codes of a mask.
        latent: size of the latent vector.
        hidden: width of encoder and decoder.
        start, end: what stands before and after the codes.
        token: a code's text, with ``{}`` for its number.
    """

    canvas: tuple[int, int]
    stride: int = 2
    num_codes: int = 64
    num_slots: int = 32
    latent: int = 32
    hidden: int = 160
    start: str = "<mask>"
    end: str = "</mask>"
    token: str = "<m{}>"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        height, width = self.canvas
        return height // self.stride, width // self.stride

    def text(self, codes: Sequence[int]) -> str:
        """Write codes as a model should.

        >>> MaskCodecConfig(canvas=(8, 8)).text([3, 12])
        '<mask><m3><m12></mask>'
        """
        return self.start + "".join(self.token.format(code) for code in codes) + self.end


class MaskCodec(nn.Module):
    """Encoder, codebooks and decoder."""

    codebooks: Tensor

    def __init__(self, config: MaskCodecConfig) -> None:
        """Make an untrained codec; its codebooks are zeros."""
        super().__init__()
        self.config = config
        rows, columns = config.grid
        self.encoder = nn.Sequential(
            nn.Linear(rows * columns, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(config.latent, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, rows * columns),
        )
        shape = (config.num_slots, config.num_codes, config.latent)
        self.register_buffer("codebooks", torch.zeros(shape))

    def embed(self, masks: Tensor) -> Tensor:
        """Turn masks ``[B, H, W]`` into latents ``[B, latent]``."""
        cells = F.avg_pool2d(masks.float()[:, None], self.config.stride)
        latents: Tensor = self.encoder(cells.flatten(1))
        return latents

    def quantise(self, latents: Tensor) -> Tensor:
        """Turn latents ``[B, latent]`` into codes ``[B, num_slots]`` int64."""
        codes, left = [], latents
        for book in self.codebooks:
            # Not torch.cdist: a row's distances there depend on how many rows there are.
            distance = (left[:, None] - book).square().sum(dim=2)
            codes.append(distance.argmin(dim=1))
            left = left - book[codes[-1]]
        return torch.stack(codes, dim=1)

    def encode(self, masks: Tensor) -> Tensor:
        """Turn masks ``[B, H, W]`` into codes ``[B, num_slots]``, the coarsest first."""
        return self.quantise(self.embed(masks))

    def look_up(self, codes: Tensor, counts: Tensor) -> Tensor:
        """Sum the entries of the first ``counts [B]`` of codes ``[B, n]``: ``[B, latent]``."""
        slots = torch.arange(codes.shape[1], device=codes.device)
        entries = self.codebooks[slots, codes]
        used = slots < counts[:, None]
        return (entries * used[:, :, None]).sum(dim=1)

    def logits(self, latents: Tensor) -> Tensor:
        """Turn latents into pixel logits ``[B, H, W]``; a pixel is in the mask above 0."""
        cells = self.decoder(latents).unflatten(1, (1, *self.config.grid))
        pixels = F.interpolate(cells, self.config.canvas, mode="bilinear", align_corners=False)
        return pixels[:, 0]

    @torch.no_grad()
    def decode(self, codes: Sequence[int]) -> Tensor:
        """Turn 1 to ``num_slots`` codes into pixel logits ``[H, W]``.

        Raises:
            ValueError: no code or too many, or one that is not in the codebook.
        """
        config = self.config
        if not 0 < len(codes) <= config.num_slots:
            raise ValueError(f"expected 1 to {config.num_slots} codes; got {len(codes)}")
        if not all(0 <= code < config.num_codes for code in codes):
            raise ValueError(f"codes are 0 to {config.num_codes - 1}; got {list(codes)}")
        counts = torch.tensor([len(codes)])
        return self.logits(self.look_up(torch.tensor([list(codes)]), counts))[0]
