"""How much moves in a video, and how smoothly, from the differences of its frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.errors import ConfigError, nearest

from .frames import as_gray


class VideoMotion:
    """Score videos by the differences of their frames; the prompt plays no part.

    With frames x_t in [0, 1] (brightness), m the mean over pixels and n frames::

        dynamic   min(1, mean over t of m|x_t - x_{t-1}| / enough)
        smooth    1 - mean over t of m|x_t - (x_{t-1} + x_{t+1}) / 2|
        both      dynamic * smooth ** sharpness

    Plain stand-ins, without weights, for VBench's dynamic degree and motion smoothness (arXiv
    2311.17982), which use optical flow and a frame interpolation model. ``both`` is what to train
    on: ``dynamic`` alone is best at flicker and noise, ``smooth`` alone at a still picture.

    Range [0, 1], higher is better. Any video of two frames or more has a score of ``dynamic``, of
    three or more a score of the others; shorter ones score 0 and (still) 1. Known limits: every
    change of brightness counts as motion, also noise, flicker, fades and cuts; so does a moving
    camera; a thing that moves further than its own size between frames is not smooth; equal motion
    of a larger or brighter thing counts more. Costs well under a millisecond per frame.

    Args:
        measure: ``dynamic``, ``smooth`` or ``both``.
        enough: mean difference between neighbouring frames that counts as fully dynamic.
        sharpness: how much more smoothness counts than motion, in ``both``.

    Raises:
        ConfigError: an unknown ``measure``, or a number that is not positive.
    """

    def __init__(self, measure: str = "both", enough: float = 0.05, sharpness: float = 4.0) -> None:
        if measure not in MEASURES:
            raise ConfigError(
                f"video_motion: unknown measure '{measure}'{nearest(measure, MEASURES)}"
            )
        for name, value in (("enough", enough), ("sharpness", sharpness)):
            if not value > 0:
                raise ConfigError(f"video_motion: {name} must be positive; got {value}.")
        self.measure, self.enough, self.sharpness = MEASURES[measure], enough, sharpness

    def __call__(self, videos: list[list[Image.Image]], **_columns: Any) -> list[float | None]:
        """Score each video; see the class."""
        return [self.measure(as_gray(video), self.enough, self.sharpness) for video in videos]


def dynamic(frames: np.ndarray[Any, Any], enough: float) -> float:
    """Return how much changes from frame to frame, in [0, 1]; frames ``[T, H, W]``."""
    if len(frames) < 2:
        return 0.0
    return min(1.0, float(np.abs(np.diff(frames, axis=0)).mean(dtype=np.float64)) / enough)


def smooth(frames: np.ndarray[Any, Any]) -> float:
    """Return how well frames are the mean of their neighbours, in [0, 1]; frames ``[T, H, W]``."""
    if len(frames) < 3:
        return 1.0
    between = (frames[:-2] + frames[2:]) / 2
    return 1.0 - float(np.abs(frames[1:-1] - between).mean(dtype=np.float64))


MEASURES: Mapping[str, Callable[[np.ndarray[Any, Any], float, float], float]] = {
    "dynamic": lambda frames, enough, _sharpness: dynamic(frames, enough),
    "smooth": lambda frames, _enough, _sharpness: smooth(frames),
    "both": lambda frames, enough, sharpness: dynamic(frames, enough) * smooth(frames) ** sharpness,
}
"""From frames ``[T, H, W]``, ``enough`` and ``sharpness`` to the score."""
