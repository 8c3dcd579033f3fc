"""Handwritten digits bundled with scikit-learn, cut into disjoint splits.

Three splits keep the roles apart: a model learns from ``train``, a reward model or judge from
``judge``, and every reported number uses ``eval``. No picture is ever in two of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from sklearn.datasets import load_digits as _load_bundled_digits

Split = Literal["train", "judge", "eval"]

# Of every ten pictures of a class, this many go to each split.
_TENTHS: dict[str, int] = {"train": 6, "judge": 2, "eval": 2}
_SPLIT_SEED = 20240


@lru_cache(maxsize=1)
def _split_indices() -> dict[str, np.ndarray]:
    """Returns the picture indices of each split, every class shared in the same proportion."""
    labels = _load_bundled_digits().target
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen: dict[str, list[int]] = {name: [] for name in _TENTHS}
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        bounds = np.cumsum([len(members) * tenths // 10 for tenths in _TENTHS.values()])[:-1]
        for name, part in zip(_TENTHS, np.split(members, bounds), strict=True):
            chosen[name].extend(part.tolist())
    return {name: np.sort(np.array(indices)) for name, indices in chosen.items()}


def load_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Loads one split of the handwritten digits.

    Args:
        split: ``"train"``, ``"judge"`` or ``"eval"``; the three share no picture.

    Returns:
        Pictures, uint8 ``[N, 8, 8]`` with bright ink (255) on black (0), and labels, int64 ``[N]``.

    Raises:
        ValueError: If ``split`` is not one of the three names.
    """
    if split not in _TENTHS:
        raise ValueError(f"unknown digit split {split!r}; choose one of {', '.join(_TENTHS)}")
    bundled = _load_bundled_digits()
    indices = _split_indices()[split]
    pictures = np.rint(bundled.images[indices] * (255.0 / 16.0)).astype(np.uint8)
    return pictures, bundled.target[indices].astype(np.int64)
