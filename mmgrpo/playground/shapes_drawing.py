"""Prompts about coloured shapes, what they ask for, and pictures of it on 24 x 24 pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 20),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = {1: "a", 2: "two", 3: "three"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_QUARTERS = {"left of": (0, 1), "right of": (1, 0), "above": (0, 2), "below": (2, 0)}
"""Where the two shapes stand; equal shapes fill the quarters in the order of reading."""

SIZE = 24
_FINE = 4  # subpixels per pixel and direction
_RADII = {"circle": 4.5, "square": 4.0, "triangle": 5.25}
"""Half the height of a shape, in pixels."""


@dataclass(frozen=True)
class Group:
    """Some equal shapes: a part of a scene."""

    shape: str
    colour: str
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one group, or one shape and where it stands to another."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The scene in words."""
        words = [
            f"{COUNTS[g.count]} {g.colour} {g.shape}{'s' if g.count > 1 else ''}"
            for g in self.groups
        ]
        return f" {self.relation} ".join(words)

    @property
    def row(self) -> dict[str, object]:
        """The data row: the prompt and its conditions, as ``image_shapes`` reads them."""
        include: list[dict[str, object]] = [
            {"class": group.shape, "color": group.colour, "count": group.count}
            for group in self.groups
        ]
        if self.relation is not None:
            include[0]["position"] = [self.relation, 1]
        return {"prompt": self.prompt, "include": include}


def all_groups(count: int = 1) -> list[Group]:
    """Return the nine groups of so many shapes."""
    return [Group(*kind, count) for kind in itertools.product(SHAPES, COLOURS)]


def all_scenes() -> list[Scene]:
    """Return the scenes that are asked for: 27 of equal shapes, and 288 pairs."""
    equal = [Scene((group,)) for count in COUNTS for group in all_groups(count)]
    pairs = [
        Scene(pair, relation)
        for relation in OPPOSITE
        for pair in itertools.permutations(all_groups(), 2)
    ]
    return equal + pairs


def spoiled(scene: Scene, rate: float, rng: np.random.Generator) -> Scene:
    """Return a scene in which each shape, colour, number and position is random at a rate."""

    def other(group: Group) -> Group:
        shape, colour, count = rng.random(3) < rate
        return Group(
            str(rng.choice(SHAPES)) if shape else group.shape,
            str(rng.choice([*COLOURS])) if colour else group.colour,
            int(rng.choice([*COUNTS])) if count and len(scene.groups) == 1 else group.count,
        )

    relation = scene.relation
    if relation is not None and rng.random() < rate:
        relation = OPPOSITE[relation] if rng.random() < 0.5 else relation
    return replace(scene, groups=tuple(other(g) for g in scene.groups), relation=relation)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene on black; each shape has one of the four quarters to itself.

    Returns:
        uint8 ``[24, 24, 3]``.
    """
    shapes = [group for group in scene.groups for _ in range(group.count)]
    return _painted(shapes, _places(len(shapes), scene.relation))


def template(group: Group | None) -> np.ndarray:
    """Draw what fills a quarter: one shape of a group, or nothing.

    Returns:
        uint8 ``[12, 12, 3]``.
    """
    shapes = [] if group is None else [group]
    return _painted(shapes, np.full((len(shapes), 2), SIZE / 4))[: SIZE // 2, : SIZE // 2]


def _painted(shapes: Sequence[Group], places: np.ndarray) -> np.ndarray:
    """Paint one shape per place, smoothly: uint8 ``[24, 24, 3]``."""
    fine = np.zeros((SIZE * _FINE, SIZE * _FINE, 3), dtype=np.float32)
    for group, (x, y) in zip(shapes, places, strict=True):
        fine[_mask(group.shape, x, y, _RADII[group.shape])] = COLOURS[group.colour]
    coarse = fine.reshape(SIZE, _FINE, SIZE, _FINE, 3).mean(axis=(1, 3))
    return np.rint(coarse).astype(np.uint8)


def _places(count: int, relation: str | None) -> np.ndarray:
    """``[count, 2]`` centres, x and y."""
    quarters = _QUARTERS[relation] if relation else range(count)
    return np.array([(quarter % 2, quarter // 2) for quarter in quarters]) * SIZE / 2 + SIZE / 4


@lru_cache(maxsize=16)
def _mask(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """``[96, 96]`` bool: the subpixels of a shape."""
    rows, columns = (np.indices((SIZE * _FINE, SIZE * _FINE)) + 0.5) / _FINE
    right, down = columns - x, rows - y
    half_width = (down + radius) / 2  # of a triangle with its tip above
    inside = {
        "circle": right**2 + down**2 <= radius**2,
        "square": np.maximum(np.abs(right), np.abs(down)) <= radius,
        "triangle": (np.abs(right) <= half_width) & (down <= radius),
    }
    return inside[shape]
