"""Latents as tokens: each is a square of 2 x 2, as the FLUX and Qwen-Image transformers read."""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Return ``[N, h/2 w/2, 4 C]`` tokens of ``[N, C, h, w]``: each is a square of 2 x 2."""
    squares = latents.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))  # N, C, h/2, 2, w/2, 2
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Undo :func:`pack`."""
    squares = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))  # N, h/2, w/2, C, 2, 2
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
