"""Prompts about coloured shapes, what they ask for, and pictures of it on 32 x 32 pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 20),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = {1: "a", 2: "two", 3: "three"}

_PAIRS = {"left of": (0, 1), "right of": (1, 0), "above": (0, 2), "below": (2, 0)}
"""Quarters, in the order of reading, of the two shapes; equal shapes fill the first quarters."""
RELATIONS = tuple(_PAIRS)

SIZE = 32
CELL = SIZE // 2
_FINE = 4  # subpixels per pixel and direction
_RADII = {"circle": 6.25, "square": 5.5, "triangle": 6.5}
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
    """Returns the nine groups of so many shapes."""
    return [Group(*kind, count) for kind in itertools.product(SHAPES, COLOURS)]


def equal_scenes() -> list[Scene]:
    """Returns the 27 scenes of one, two or three equal shapes."""
    return [Scene((group,)) for count in COUNTS for group in all_groups(count)]


def pair_scenes() -> list[Scene]:
    """Returns the 288 scenes of two different shapes."""
    return [
        Scene(pair, relation)
        for relation in RELATIONS
        for pair in itertools.permutations(all_groups(), 2)
    ]


def spoiled(scene: Scene, rate: float, rng: np.random.Generator) -> Scene:
    """Returns a scene in which each shape, colour, number and position is random at a rate."""

    def other(group: Group) -> Group:
        shape, colour, count = rng.random(3) < rate
        return Group(
            str(rng.choice(SHAPES)) if shape else group.shape,
            str(rng.choice([*COLOURS])) if colour else group.colour,
            int(rng.choice([*COUNTS])) if count and scene.relation is None else group.count,
        )

    relation = scene.relation
    if relation is not None and rng.random() < rate:
        relation = str(rng.choice(RELATIONS))
    return replace(scene, groups=tuple(other(g) for g in scene.groups), relation=relation)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene on black; each shape has one of the four quarters to itself.

    Returns:
        uint8 ``[32, 32, 3]``.
    """
    shapes = [group for group in scene.groups for _ in range(group.count)]
    cells: list[Group | None] = [None] * 4
    quarters = _PAIRS[scene.relation] if scene.relation else range(len(shapes))
    for group, quarter in zip(shapes, quarters, strict=True):
        cells[quarter] = group
    return compose(cells)


def compose(cells: Sequence[Group | None]) -> np.ndarray:
    """Puts four drawings, in the order of reading, together: uint8 ``[32, 32, 3]``."""
    drawn = [draw_cell(group) for group in cells]
    return np.concatenate([np.concatenate(drawn[k : k + 2], axis=1) for k in (0, 2)])


@cache
def draw_cell(group: Group | None) -> np.ndarray:
    """Draws what fills a quarter: one shape of a group, or nothing: uint8 ``[16, 16, 3]``."""
    fine = np.zeros((CELL * _FINE, CELL * _FINE, 3), dtype=np.float32)
    if group is not None:
        fine[_mask(group.shape)] = COLOURS[group.colour]
    coarse = fine.reshape(CELL, _FINE, CELL, _FINE, 3).mean(axis=(1, 3))
    return np.rint(coarse).astype(np.uint8)


def _mask(shape: str) -> np.ndarray:
    """``[64, 64]`` bool: the subpixels of a shape in the middle of a quarter."""
    down, right = (np.indices((CELL * _FINE, CELL * _FINE)) + 0.5) / _FINE - CELL / 2
    radius = _RADII[shape]
    half_width = (down + radius) / 2 * 1.1  # of a triangle with its tip above
    inside = {
        "circle": right**2 + down**2 <= radius**2,
        "square": np.maximum(np.abs(right), np.abs(down)) <= radius,
        "triangle": (np.abs(right) <= half_width) & (np.abs(down) <= radius),
    }
    return inside[shape]
