"""Whether the digits that were asked for move as they were asked to: a tracker and a classifier."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.errors import ConfigError, nearest

from .classifier_score import ClassifierScore
from .digit_tracking import Place, track
from .frames import as_gray

DIRECTIONS: Mapping[str, Place | None] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "still": None,
}
"""Where a digit may be asked to go: right and down are positive."""
MAX_DIGITS = 4

Judged = Sequence[tuple[float, bool, float]]
"""Of each digit: the probability of the right one, whether it is the likeliest, its direction."""
REDUCTIONS: Mapping[str, Callable[[Judged], float]] = {
    "mean": lambda judged: sum(right + way for right, _, way in judged) / (2 * len(judged)),
    "all_correct": lambda judged: float(
        all(likeliest and way > math.sqrt(0.5) for _, likeliest, way in judged)
    ),
}
"""From what is known about the digits of a video to its score."""


class VideoDigitsMotion:
    """Score videos of bright digits on a dark background by which digits move where.

    The column ``digit`` has a digit or a list of some, the column ``direction`` as many of
    ``left``, ``right``, ``up``, ``down`` and ``still``. In each frame the squares with the most ink
    are the digits; each is joined to the nearest in the next frame, read by a classifier in every
    frame, and its way is fitted with a straight line. Digits and directions may be matched in any
    way. A digit's direction scores the cosine between its way and what was asked for, 0 if it is
    negative or the way shorter than ``min_travel``; ``still`` scores 1 for a shorter way, else 0.

    Range [0, 1], higher is better: ``mean`` is the mean over the digits of (probability of the
    right digit, averaged over frames + direction) / 2; ``all_correct`` is 1 if every digit is read
    right (by the mean probability) and goes within 45 degrees of its direction, else 0. Any video
    has a score. A row whose ``digit`` is null scores None; digits or directions that cannot be
    understood raise ValueError. Known limits: digits that cross or overlap may be mistaken for one
    another, and digits that turn back are judged by their fitted line. Costs a few milliseconds
    per video.

    Args:
        path: folder of a classifier of digits that ``AutoModelForImageClassification`` loads, with
            its image processor.
        reduce: ``mean`` or ``all_correct``.
        side: of the square that a digit fills, in pixels.
        min_travel: way from first to last frame, in pixels, from which a digit moves.
        device: where the classifier runs; a GPU if there is one.

    Raises:
        ConfigError: no such folder, or an unknown ``reduce``.
    """

    def __init__(
        self,
        path: str,
        reduce: str = "mean",
        side: int = 8,
        min_travel: float = 2.0,
        device: str | None = None,
    ) -> None:
        if reduce not in REDUCTIONS:
            known = nearest(reduce, REDUCTIONS)
            raise ConfigError(f"video_digits_motion: unknown reduce '{reduce}'{known}")
        if not Path(path, "config.json").is_file():
            raise ConfigError(
                f"video_digits_motion: '{path}' is not a model folder (no config.json)."
            )
        self.classifier = ClassifierScore(path, grid=(1, 1), device=device)
        self.reduce = REDUCTIONS[reduce]
        self.side, self.min_travel = side, min_travel

    def __call__(
        self,
        videos: list[list[Image.Image]],
        digit: list[int | list[int] | None],
        direction: list[str | list[str] | None],
        **_columns: Any,
    ) -> list[float | None]:
        """Score each video; see the class."""
        return [
            None if digits is None else self._score(video, digits, ways)
            for video, digits, ways in zip(videos, digit, direction, strict=True)
        ]

    def _score(self, video: Sequence[Image.Image], digit: Any, direction: Any) -> float:
        digits = [digit] if isinstance(digit, int) else list(digit)
        ways = [direction] if isinstance(direction, str) else list(direction or ())
        _check(digits, ways)
        tracks = track(as_gray(video), len(digits), self.side)
        pictures = np.rint(np.concatenate([t.pictures for t in tracks]) * 255).astype(np.uint8)
        read = self.classifier.probabilities([Image.fromarray(picture) for picture in pictures])
        probability = read[:, 0].unflatten(0, (len(tracks), -1)).mean(dim=1)
        values = probability.tolist()
        return max(
            self.reduce(
                [
                    (values[n][digit], values[n].index(max(values[n])) == digit,
                     direction_score(tracks[n].travel, way, self.min_travel))
                    for n, digit, way in zip(matching, digits, ways, strict=True)
                ]
            )
            for matching in itertools.permutations(range(len(tracks)))
        )  # fmt: skip


def direction_score(travel: Place, way: str, min_travel: float) -> float:
    """Return how well a way fits a direction, in [0, 1]; see the class.

    >>> direction_score((3.0, 4.0), "down", 2.0)
    0.8
    """
    length, unit = math.hypot(*travel), DIRECTIONS[way]
    if unit is None:
        return float(length < min_travel)
    if length < min_travel:
        return 0.0
    return max(0.0, (travel[0] * unit[0] + travel[1] * unit[1]) / length)


def _check(digits: Sequence[Any], ways: Sequence[Any]) -> None:
    if not 1 <= len(digits) <= MAX_DIGITS or len(ways) != len(digits):
        raise ValueError(
            f"expected 1 to {MAX_DIGITS} digits and as many directions; got {digits} and {ways}"
        )
    if not all(isinstance(digit, int) and 0 <= digit <= 9 for digit in digits):
        raise ValueError(f"a digit must be a number from 0 to 9; got {digits}")
    for way in ways:
        if way not in DIRECTIONS:
            raise ValueError(f"unknown direction '{way}'{nearest(way, DIRECTIONS)}")
