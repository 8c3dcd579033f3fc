"""Find coloured shapes in a picture: connected areas of one colour, named by their outline."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.errors import MissingExtraError

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (139, 69, 19),
    "gray": (128, 128, 128),
    "green": (0, 160, 0),
    "orange": (255, 140, 0),
    "pink": (255, 150, 190),
    "purple": (128, 0, 160),
    "red": (220, 20, 20),
    "white": (255, 255, 255),
    "yellow": (250, 230, 30),
}
"""The colours that can be asked for: GenEval's ten and gray."""

OUTLINES: Mapping[str, tuple[float, float]] = {
    "circle": (1.0, math.pi / 4),
    "square": (1.0, 1.0),
    "triangle": (1.0, 0.5),
    "star": (0.472, 0.691),
    "cross": (0.714, 0.875),
}
"""Share of its convex hull that the shape fills, and that the hull fills of the smallest rectangle
around it: both do not change when the shape is moved, turned or scaled."""

ELONGATED: Mapping[str, str] = {"circle": "ellipse", "square": "rectangle"}
MAX_ASPECT = 1.25
"""Longer side over shorter side of the smallest rectangle, up to which these are not elongated."""
MAX_OUTLINE_DISTANCE = 0.2
"""Outlines further than this from all in the table belong to no shape."""
SHAPES = (*OUTLINES, *ELONGATED.values())
MIN_SIDE = 96
"""Pixels to which smaller pictures are enlarged: outlines of few pixels are all alike."""


@dataclass(frozen=True)
class Shape:
    """A shape in a picture: its name (None if unknown), colour, centre and area in pixels."""

    name: str | None
    colour: str
    x: float
    y: float
    area: int


def check_scipy() -> None:
    """Raise MissingExtraError if scipy is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise MissingExtraError("scipy", "playground")


def find_shapes(
    pixels: np.ndarray[Any, Any], *, min_area: float = 0.002, colour_distance: float = 90.0
) -> list[Shape]:
    """Return the shapes of a picture, in the order of the colour table and then of reading.

    Args:
        pixels: ``[H, W, 3]`` RGB, 0 to 255.
        min_area: smaller areas, as a share of the picture, are no shapes.
        colour_distance: pixels further from every colour of the table belong to no shape.
    """
    factor = max(1, math.ceil(MIN_SIDE / min(pixels.shape[:2])))
    labels = _nearest_colour(_enlarged(pixels, factor), colour_distance)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = np.bincount(border, minlength=len(COLOURS) + 1).argmax()
    found = [
        _measure(*area, colour)
        for index, colour in enumerate(COLOURS)
        if index != background
        for area in _areas(labels == index, min_area * labels.size, seam=factor)
    ]
    return [
        replace(s, x=s.x / factor, y=s.y / factor, area=round(s.area / factor**2)) for s in found
    ]


def _enlarged(pixels: np.ndarray[Any, Any], factor: int) -> np.ndarray[Any, Any]:
    if factor <= 1:
        return pixels
    size = (pixels.shape[1] * factor, pixels.shape[0] * factor)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=4)
def _colour_table(limit: float) -> np.ndarray[Any, Any]:
    """``[64, 64, 64]`` index into the colours for every fourth value, their number for none."""
    levels = np.arange(2, 256, 4, dtype=np.float32)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    known = np.array(list(COLOURS.values()), dtype=np.float32)
    distance = np.stack([np.linalg.norm(grid - colour, axis=-1) for colour in known])
    table = np.where(distance.min(axis=0) <= limit, distance.argmin(axis=0), len(COLOURS))
    return table.astype(np.uint8)


def _nearest_colour(pixels: np.ndarray[Any, Any], limit: float) -> np.ndarray[Any, Any]:
    """``[H, W]`` index into the colours, or their number where none is within the limit."""
    red, green, blue = np.moveaxis(pixels >> 2, -1, 0)
    return _colour_table(limit)[red, green, blue]


def dominant_colour(
    pixels: np.ndarray[Any, Any], inside: np.ndarray[Any, Any] | None, among: Sequence[str]
) -> str | None:
    """Return the named colour that is the nearest for most pixels; None without pixels.

    Args:
        pixels: ``[H, W, 3]`` RGB, 0 to 255.
        inside: ``[H, W]`` bool, the pixels that count; all of them if None.
        among: names of colours of the table; the first of two that are level wins.
    """
    step = max(1, min(pixels.shape[:2]) // 64)  # a sample of a large object is enough
    pixels = pixels[::step, ::step]
    chosen = pixels.reshape(-1, 3) if inside is None else pixels[inside[::step, ::step]]
    if not len(chosen):
        return None
    known = np.array([COLOURS[name] for name in among], dtype=np.float32)
    distance = np.linalg.norm(chosen[:, None].astype(np.float32) - known, axis=-1)
    return among[int(np.bincount(distance.argmin(axis=1), minlength=len(among)).argmax())]


def _areas(
    mask: np.ndarray[Any, Any], smallest: float, *, seam: int
) -> Iterator[tuple[np.ndarray[Any, Any], int, int]]:
    """The connected areas that are large and not thin, each cut out, with its first row and column.

    Areas without a core of more than the seam's width are the seams between two colours.
    """
    from scipy import ndimage

    if mask.sum() < smallest:
        return
    square, core = np.ones((3, 3)), max(1, round(0.75 * seam))
    labels, _ = ndimage.label(mask, structure=square)
    sizes = np.bincount(labels.ravel())
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if sizes[number] >= smallest:
            area = labels[box] == number
            if ndimage.binary_erosion(area, structure=square, iterations=core).any():
                yield area, box[0].start, box[1].start


def _measure(mask: np.ndarray[Any, Any], top: int, left: int, colour: str) -> Shape:
    """An outlined shape, or one with another inside it, is what it is when it is filled."""
    from scipy import ndimage

    filled = ndimage.binary_fill_holes(mask)
    rows, columns = np.nonzero(filled)
    solidity, fill, aspect = outline(filled)
    distances = {
        name: math.hypot(solidity - known[0], fill - known[1]) for name, known in OUTLINES.items()
    }
    best = min(distances, key=distances.__getitem__)
    name: str | None = best if distances[best] <= MAX_OUTLINE_DISTANCE else None
    if aspect > MAX_ASPECT and best in ELONGATED:
        name = ELONGATED[best] if name else None
    x, y = left + float(columns.mean()) + 0.5, top + float(rows.mean()) + 0.5
    return Shape(name, colour, x, y, int(mask.sum()))


def outline(mask: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Return how the area fills its convex hull, how that fills its rectangle, and the aspect.

    Args:
        mask: ``[H, W]`` bool, one connected area.
    """
    from scipy.spatial import ConvexHull

    rows, columns = np.nonzero(mask)
    corners = np.concatenate(
        [np.stack([columns + dx, rows + dy], axis=1) for dx in (0, 1) for dy in (0, 1)]
    ).astype(np.float64)
    hull = ConvexHull(corners)
    points = corners[hull.vertices]
    # One side of the smallest rectangle around a convex polygon lies on one of the polygon's.
    edges = np.roll(points, -1, axis=0) - points
    angles = np.arctan2(edges[:, 1], edges[:, 0])
    axes = np.stack([np.cos(angles), np.sin(angles)], axis=0)
    width = np.ptp(points @ axes, axis=0)
    height = np.ptp(points @ np.stack([-axes[1], axes[0]], axis=0), axis=0)
    smallest = int((width * height).argmin())
    sides = sorted((float(width[smallest]), float(height[smallest])))
    return len(rows) / hull.volume, hull.volume / (sides[0] * sides[1]), sides[1] / sides[0]
