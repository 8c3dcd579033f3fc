"""Whether what was asked for is in the cells of a picture, by comparison with drawings of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.errors import ConfigError, nearest

from .scene_rules import REDUCTIONS, Box, ExactRules, Thing, conditions, read_specification

BLANK = "blank"
"""Stem of the file that shows an empty cell."""


class ImageTemplates:
    """Score pictures on a grid by the conditions of their prompt that they meet.

    Each cell shows what the nearest drawing of a folder shows: pixel by pixel, with neither colour
    table nor outline, so that it errs elsewhere than ``image_shapes``: the one can judge what was
    trained with the other. The column ``include`` is the one of ``image_shapes``, and so are its
    conditions; a last condition is that every cell resembles some drawing or the empty cell.

    Range [0, 1], higher is better: ``share`` is the share of conditions met, ``all`` is 1 where all
    are, else 0. Any picture has a score. A row whose ``include`` is null scores None; an entry that
    cannot be understood, or asks for something that is not in the folder, raises ValueError.

    Args:
        path: folder of PNG files of one size, ``<colour>-<class>.png`` and ``blank.png``.
        grid: cells per column and per row.
        reduce: ``share`` or ``all``.
        max_distance: how far from a drawing a cell may be: root mean square over its RGB values.

    Raises:
        ConfigError: no such folder or drawings in it, or an unknown ``reduce``.
    """

    def __init__(
        self,
        path: str,
        grid: Sequence[int] = (2, 2),
        reduce: str = "all",
        max_distance: float = 40.0,
    ) -> None:
        if reduce not in REDUCTIONS:
            raise ConfigError(
                f"image_templates: unknown reduce '{reduce}'{nearest(reduce, REDUCTIONS)}"
            )
        self.labels, self.drawings = _drawings(Path(path))
        self.rows, self.columns = (int(cells) for cells in grid)
        self.reduce = REDUCTIONS[reduce]
        self.max_distance = max_distance

    def __call__(
        self, images: list[Image.Image], include: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        return [
            None if wanted is None else self._score(image, wanted)
            for image, wanted in zip(images, include, strict=True)
        ]

    def _score(self, image: Image.Image, include: list[Any]) -> float:
        known = [label for label in self.labels if label is not None]
        colours, classes = zip(*known, strict=True)
        wanted = read_specification(include, [], classes, colours)
        things, all_clear = self.find(image)
        met = conditions(wanted, things, ExactRules(margin=0.0), image.size)
        return self.reduce([*met, all_clear])

    def find(self, image: Image.Image) -> tuple[list[Thing], bool]:
        """Return what is in the cells, and whether every cell could be recognised."""
        boxes = self._boxes(image.size)
        height, width = self.drawings.shape[1:3]
        cells = np.stack([_pixels(image.resize((width, height), _BOX, box)) for box in boxes])
        squares = (cells[:, None] - self.drawings[None]) ** 2
        distances = np.sqrt(squares.mean(axis=(2, 3, 4)))
        best, clear = distances.argmin(axis=1), distances.min(axis=1) <= self.max_distance
        shown = [self.labels[k] if ok else None for k, ok in zip(best, clear, strict=True)]
        things = [
            Thing(name=label[1], colour=label[0], box=box)
            for label, box in zip(shown, boxes, strict=True)
            if label is not None
        ]
        return things, bool(clear.all())

    def _boxes(self, size: tuple[int, int]) -> list[Box]:
        width, height = size[0] / self.columns, size[1] / self.rows
        return [
            (column * width, row * height, (column + 1) * width, (row + 1) * height)
            for row in range(self.rows)
            for column in range(self.columns)
        ]


_BOX = Image.Resampling.BOX


def _pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _drawings(folder: Path) -> tuple[list[tuple[str, str] | None], np.ndarray[Any, Any]]:
    """Colour and class of each drawing, None for the empty cell, and ``[N, H, W, 3]`` float32."""
    files = sorted(folder.glob("*.png"))
    if BLANK not in {file.stem for file in files} or len(files) < 2:
        raise ConfigError(
            f"image_templates: '{folder}' must hold {BLANK}.png and drawings such as "
            f"red-circle.png; found {[file.name for file in files] or 'no PNG files'}."
        )
    labels: list[tuple[str, str] | None] = []
    pictures = []
    for file in files:
        colour, _, name = file.stem.partition("-")
        if file.stem != BLANK and not name:
            raise ConfigError(f"image_templates: {file.name} is not '<colour>-<class>.png'.")
        labels.append(None if file.stem == BLANK else (colour, name))
        with Image.open(file) as picture:
            pictures.append(_pixels(picture))
    if len({picture.shape for picture in pictures}) > 1:
        raise ConfigError(f"image_templates: the drawings of '{folder}' differ in size.")
    return labels, np.stack(pictures)
