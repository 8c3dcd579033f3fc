"""What rewards on videos share: which frames of a video are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.errors import ConfigError

Video = Sequence[Image.Image]
"""Frames, in order."""


def check_count(reward: str, frames: int) -> int:
    """Return the number of frames to look at.

    Raises:
        ConfigError: it is not positive.
    """
    if frames < 1:
        raise ConfigError(f"{reward}: frames must be a positive number; got {frames}.")
    return frames


def sampled(video: Video, count: int) -> list[Image.Image]:
    """Return ``count`` frames at equal distances, first and last among them; one is the middle one.

    A video with fewer frames repeats some of them.

    Raises:
        ValueError: the video has no frames, or is no list of frames.
    """
    frames = checked(video)
    if count == 1:
        return [frames[len(frames) // 2]]
    last = len(frames) - 1
    return [frames[round(last * number / (count - 1))] for number in range(count)]


def checked(video: Video) -> list[Image.Image]:
    """Return the frames as a list.

    Raises:
        ValueError: see :func:`sampled`.
    """
    if isinstance(video, str | Image.Image) or not isinstance(video, Sequence) or not len(video):
        raise ValueError(f"a video must be a list of one or more frames; got {str(video)[:80]!r}")
    if not all(isinstance(frame, Image.Image) for frame in video):
        kinds = sorted({type(frame).__name__ for frame in video})
        raise ValueError(f"the frames of a video must be pictures; got {', '.join(kinds)}")
    return list(video)


def as_gray(video: Video) -> np.ndarray[Any, Any]:
    """Return ``[T, H, W]`` float32 brightness in [0, 1].

    Raises:
        ValueError: the frames differ in size.
    """
    frames = [np.asarray(frame.convert("L"), dtype=np.float32) / 255 for frame in checked(video)]
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError("the frames of a video must all have the same size")
    return np.stack(frames)
