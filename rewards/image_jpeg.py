"""How well a picture compresses: a reward without a model, for checking that training works."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mmgrpo.errors import ConfigError, nearest

SIGN: Mapping[str, float] = {"smaller": -1.0, "larger": 1.0}
"""What ``prefer`` asks for -> the sign of the size in the score."""


class ImageJpeg:
    """Score pictures by their size as JPEG files, in kB of 1000 bytes (DDPO, arXiv 2305.13301).

    Range (-inf, 0) for ``prefer: smaller`` (compressibility, minus the size) and (0, inf) for
    ``prefer: larger`` (incompressibility, the size); higher is better. Any picture has a score; it
    grows with the resolution. Costs one JPEG encoding per picture, on the CPU. The exact size
    depends on the JPEG library that Pillow was built with.

    Args:
        prefer: ``smaller`` or ``larger``.
        quality: JPEG quality, 1 to 95.

    Raises:
        ConfigError: an unknown ``prefer`` or a quality out of range.
    """

    def __init__(self, prefer: str = "smaller", quality: int = 95) -> None:
        if prefer not in SIGN:
            raise ConfigError(f"image_jpeg: unknown prefer '{prefer}'{nearest(prefer, SIGN)}")
        if not 1 <= quality <= 95:
            raise ConfigError(f"image_jpeg: quality must be from 1 to 95; got {quality}.")
        self.sign = SIGN[prefer]
        self.quality = quality

    def __call__(self, images: list[Image.Image], **_columns: Any) -> list[float | None]:
        """Score each picture; see the class."""
        return [self.sign * jpeg_bytes(image, self.quality) / 1000 for image in images]


def jpeg_bytes(image: Image.Image, quality: int) -> int:
    """Return the number of bytes of the picture as a JPEG file."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
