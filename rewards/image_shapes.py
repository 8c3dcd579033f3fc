"""Whether the coloured shapes that were asked for are in the picture: no model is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.errors import ConfigError, nearest

from .scene_rules import REDUCTIONS, ExactRules, Thing, conditions, read_specification
from .shape_finding import COLOURS, SHAPES, check_scipy, find_shapes


class ImageShapes:
    """Score pictures of plain coloured shapes by the conditions of their prompt that they meet.

    The conditions are GenEval's (arXiv 2310.11513) and come in its form, in the column
    ``include``: a list of objects, each with ``class`` (circle, ellipse, square, rectangle,
    triangle, star, cross) and optionally ``count`` (1), ``color`` and ``position``, a pair of
    ``left of``, ``right of``, ``above`` or ``below`` and the number of another entry, or null for
    the middle of the picture. The conditions of an entry are

    - object: there is a shape of the class;
    - count: exactly ``count`` of the class (and colour) are there, where GenEval accepts more;
    - colour, if given: there is one of the class and colour;
    - position, if given: ``count`` of them stand so to some shape of the other entry.

    An entry of the optional column ``exclude`` has a class, a count and perhaps a colour, and its
    condition is that there are fewer.

    Range [0, 1], higher is better: ``share`` is the share of conditions met, ``all`` is 1 where all
    are, else 0. Any picture has a score. A row whose ``include`` is null scores None; an entry that
    cannot be understood raises ValueError. Shapes are single-coloured areas on a background, which
    is the commonest colour along the border; outlines that are not in the table get the name of
    the nearest. Costs about 15 ms for 256 x 256 pixels, 0.2 s for 1024 x 1024, on the CPU.

    Args:
        reduce: ``share`` or ``all``.
        min_area: smaller areas are no shapes; a share of the picture.
        margin: how clear a position must be; a share of the picture's longer side.
        colour_distance: how far from its name a colour may be, in RGB values (Euclidean).

    Raises:
        ConfigError: an unknown ``reduce``.
        MissingExtraError: scipy is not installed.
    """

    def __init__(
        self,
        reduce: str = "share",
        min_area: float = 0.002,
        margin: float = 0.02,
        colour_distance: float = 90.0,
    ) -> None:
        if reduce not in REDUCTIONS:
            raise ConfigError(
                f"image_shapes: unknown reduce '{reduce}'{nearest(reduce, REDUCTIONS)}"
            )
        check_scipy()
        self.reduce = REDUCTIONS[reduce]
        self.min_area = min_area
        self.margin = margin
        self.colour_distance = colour_distance

    def __call__(
        self,
        images: list[Image.Image],
        include: list[Any],
        exclude: list[Any] | None = None,
        **_columns: Any,
    ) -> list[float | None]:
        """Score each picture; see the class."""
        excluded = exclude or [None] * len(images)
        return [
            None if wanted is None else self._score(image, wanted, unwanted or [])
            for image, wanted, unwanted in zip(images, include, excluded, strict=True)
        ]

    def _score(self, image: Image.Image, include: list[Any], exclude: list[Any]) -> float:
        wanted = read_specification(include, exclude, SHAPES, COLOURS)
        pixels = np.asarray(image.convert("RGB"))
        found = find_shapes(pixels, min_area=self.min_area, colour_distance=self.colour_distance)
        things = [Thing(s.name, s.colour, (s.x, s.y, s.x, s.y)) for s in found]
        rules = ExactRules(self.margin * max(image.size))
        return self.reduce(conditions(wanted, things, rules, image.size))
