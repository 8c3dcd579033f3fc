"""Follow bright digits on a dark background through the frames of a video."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Place = tuple[float, float]
"""x and y of a centre, in pixels."""


@dataclass(frozen=True)
class Track:
    """One digit through a video: the pictures of it ``[T, side, side]``, and where it was."""

    pictures: np.ndarray[Any, Any]
    places: tuple[Place, ...]

    @property
    def travel(self) -> Place:
        """How far it moves to the right and down, from first to last frame (least squares)."""
        times = np.arange(len(self.places)) - (len(self.places) - 1) / 2
        if len(times) < 2:
            return 0.0, 0.0
        slope = times @ np.array(self.places) / (times @ times)
        x, y = slope * (len(times) - 1)
        return float(x), float(y)


def track(frames: np.ndarray[Any, Any], count: int, side: int) -> list[Track]:
    """Find the digits in each frame and join those that are the nearest in the next.

    Args:
        frames: ``[T, H, W]`` brightness in [0, 1].
        count: how many digits there are.
        side: of the square that a digit fills, in pixels.

    Raises:
        ValueError: a frame is smaller than a digit.
    """
    if min(frames.shape[1:]) < side:
        raise ValueError(f"frames of {frames.shape[2]} x {frames.shape[1]} have no room for digits")
    order: list[Place] = []
    found: list[list[Place]] = []
    for frame in frames:
        order = _joined(order, _centres(frame, count, side))
        found.append(order)
    return [
        Track(
            np.stack([_cut(f, p[n], side) for f, p in zip(frames, found, strict=True)]),
            tuple(places[n] for places in found),
        )
        for n in range(count)
    ]


def _centres(frame: np.ndarray[Any, Any], count: int, side: int) -> list[Place]:
    """The centres of ink of the squares with the most ink, each without what others hold."""
    left = frame.astype(np.float64)
    centres = []
    for _ in range(count):
        sums = np.lib.stride_tricks.sliding_window_view(left, (side, side)).sum(axis=(2, 3))
        top, start = np.unravel_index(sums.argmax(), sums.shape)
        centre = _centre_of_ink(left, int(start), int(top), side)
        column, row = _corner(frame, centre, side)
        centres.append(_centre_of_ink(left, column, row, side))
        left[row : row + side, column : column + side] = 0
    return centres


def _centre_of_ink(frame: np.ndarray[Any, Any], column: int, row: int, side: int) -> Place:
    """The mean position of the brightness in a square; its middle if there is none."""
    ink = frame[row : row + side, column : column + side]
    total = ink.sum()
    if total < 1e-6:
        return column + side / 2, row + side / 2
    y, x = (np.indices(ink.shape) + 0.5).reshape(2, -1) @ ink.ravel() / total
    return column + float(x), row + float(y)


def _corner(frame: np.ndarray[Any, Any], centre: Place, side: int) -> tuple[int, int]:
    """The first column and row of the square around a centre, inside the frame."""
    height, width = frame.shape
    # Not round(): it would go up at one half column and down at the next.
    column, row = (math.floor(place - side / 2 + 0.5) for place in centre)
    return min(max(column, 0), width - side), min(max(row, 0), height - side)


def _cut(frame: np.ndarray[Any, Any], centre: Place, side: int) -> np.ndarray[Any, Any]:
    column, row = _corner(frame, centre, side)
    return frame[row : row + side, column : column + side]


def _joined(before: Sequence[Place], now: Sequence[Place]) -> list[Place]:
    """The places in the order of those before them, with the shortest ways in all."""
    if not before:
        return sorted(now)
    orders = itertools.permutations(now)
    return list(min(orders, key=lambda order: sum(map(math.dist, before, order))))
