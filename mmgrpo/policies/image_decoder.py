"""The decoder of image codes: a ``VQModel`` of diffusers in the folder ``vq`` of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.config.image_layout import ImageLayout
from mmgrpo.errors import ModelError
from mmgrpo.policies.loading import first_line

FOLDER = "vq"
CLASS = "VQModel"
BATCH = 64
"""Pictures that are decoded at the same time."""


def load_decoder(folder: str | Path) -> Any:
    """Load the decoder of a model folder, frozen.

    Raises:
        ModelError: there is none, or it is of another class.
    """
    path = Path(folder) / FOLDER
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{folder} has no decoder of its image codes; expected a diffusers {CLASS} in {path}."
        )
    kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if kind != CLASS:
        raise ModelError(f"{path} holds a {kind}; expected a diffusers {CLASS}.")
    from diffusers import VQModel

    try:
        decoder = VQModel.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"Cannot load the decoder {path}: {first_line(error)}") from error
    return decoder.requires_grad_(False).eval()


def check_decoder(decoder: Any, layout: ImageLayout) -> None:
    """Raise ModelError if the codebook does not have the layout's number of codes."""
    size = decoder.quantize.n_e
    if size != layout.num_codes:
        raise ModelError(
            f"image_tokens.json says num_codes {layout.num_codes}, and the decoder has {size}."
        )


@torch.no_grad()
def decode_images(decoder: Any, codes: Tensor, grid: list[int]) -> list[Image.Image]:
    """Decode ``[B, rows * columns]`` codes into RGB pictures."""
    images: list[Image.Image] = []
    for part in codes.split(BATCH):
        shape = (len(part), *grid, decoder.quantize.vq_embed_dim)
        entries = decoder.quantize.get_codebook_entry(part.flatten(), shape)
        spatial = entries if decoder.config.norm_type == "spatial" else None
        images += to_images(decoder.decoder(decoder.post_quant_conv(entries), spatial))
    return images


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn ``[B, 3, H, W]`` colours in [-1, 1] into 8-bit RGB pictures."""
    pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(row) for row in pixels.permute(0, 2, 3, 1).cpu().numpy()]
