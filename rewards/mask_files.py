"""What the mask reward reads: the codec's folder, and ground-truth masks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.core.mask_codec import MaskCodec, MaskCodecConfig
from mmgrpo.errors import ConfigError, ModelError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def load_codec(folder: str | Path) -> MaskCodec:
    """Load a codec's ``config.json`` and ``model.safetensors``.

    Raises:
        ConfigError: one of the files is missing.
        ModelError: they do not fit each other.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"mask_tokens: '{folder}' is not a mask codec folder (no {name}).")
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        codec = MaskCodec(MaskCodecConfig(**{**fields, "canvas": tuple(fields["canvas"])}))
        weights = load_file(folder / WEIGHTS)
        codec.load_state_dict({name: value.float() for name, value in weights.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"mask_tokens: the codec in '{folder}' cannot be read: {reason}"
        ) from error
    return codec.requires_grad_(False).eval()


def read_mask(value: Any, root: Path) -> np.ndarray[Any, Any]:
    """Read a ground-truth mask, bool ``[H, W]``.

    Args:
        value: COCO's uncompressed run lengths ``{"size": [H, W], "counts": [...]}`` (down the
            columns, the first run outside the mask), or the path of a picture that is black outside
            the mask.
        root: folder to which such paths are relative.

    Raises:
        ValueError: it is neither, or the runs do not fill the mask.
        OSError: the picture cannot be read.
    """
    if isinstance(value, str):
        with Image.open(root / value) as picture:
            return np.asarray(picture.convert("L")) > 0
    if not (isinstance(value, Mapping) and {"size", "counts"} <= set(value)):
        raise ValueError(f"a mask is run lengths (size, counts) or a path; got {str(value)[:80]!r}")
    height, width = value["size"]
    counts = list(value["counts"])
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"runs of {sum(counts)} pixels do not fill a mask of {height} x {width}")
    bits = np.repeat([on for on, _ in zip(cycle((False, True)), counts, strict=False)], counts)
    return bits.reshape((height, width), order="F")
