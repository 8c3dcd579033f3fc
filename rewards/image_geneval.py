"""GenEval: whether the objects of a prompt are in a photo, by a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmgrpo.errors import ConfigError, nearest

from .clip_models import HfClip
from .object_detection import Detection, Detector, without_overlap
from .scene_rules import (
    REDUCTIONS,
    GenevalRules,
    Specification,
    Thing,
    conditions,
    read_specification,
)
from .shape_finding import dominant_colour

GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black",
                   "white")  # fmt: skip
TEMPLATES = (
    "a photo of a {colour} {class}",
    "a photo of a {colour}-colored {class}",
    "a photo of a {colour} object",
)
BLANK = (153, 153, 153)
"""What stands behind an object that was cut out by its mask: GenEval's #999."""


class ImageGeneval:
    """Score photos by the conditions of their prompt that they meet (GenEval, arXiv 2310.11513).

    What a prompt asks for comes in GenEval's form, in the columns ``include`` and ``exclude``; see
    ``image_shapes``, whose conditions these are but for the rules: at least ``count`` objects of
    the class; colour and position look at the ``count`` most confident ones, all of which must
    have the colour and stand so to all of the other entry's; ``exclude`` is met by fewer than its
    count. A position needs an offset of more than 0.1 of both boxes' sizes. Objects count from
    confidence 0.3 on, and from 0.9 on in counting tasks: rows whose column ``tag`` is ``counting``,
    or without that column, rows that ask for more than one of something.

    Range [0, 1], higher is better: ``all`` is GenEval's verdict, ``share`` the share of conditions
    met, which is easier to learn from. Any picture has a score. A row whose ``include`` is null
    scores None; an entry that cannot be understood, or a class that the detector does not know,
    raises ValueError. Costs a forward pass of the detector per picture, one by one, and one of CLIP
    per object whose colour matters. GenEval uses Mask2Former (Swin-S, COCO) and CLIP ViT-L/14; with
    other detectors the level differs, not the rules. What a detector may be used for is a matter of
    its licence.

    Args:
        detector: folder of a detection model of transformers, with ``model.safetensors`` and its
            processor: DETR, RT-DETR, YOLOS, OWLv2, Mask2Former and the like.
        clip: folder with a ``CLIPModel`` and its processor, which names colours; if null, an
            object's colour is that of most of its pixels, by the nearest named colour.
        reduce: ``all`` or ``share``.
        threshold: confidence from which an object counts.
        counting_threshold: the same in counting tasks.
        max_objects: so many of a class at most.
        max_overlap: objects that overlap a more confident one of their class by this (IoU) are left
            out; 1 keeps all, as GenEval does.
        position_threshold: see above.
        device: where it runs; a GPU if there is one.

    Raises:
        ConfigError: a missing file, a model that is no detector, or an unknown ``reduce``.
    """

    def __init__(
        self,
        detector: str,
        clip: str | None = None,
        *,
        reduce: str = "all",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        position_threshold: float = 0.1,
        device: str | None = None,
    ) -> None:
        if reduce not in REDUCTIONS:
            raise ConfigError(
                f"image_geneval: unknown reduce '{reduce}'{nearest(reduce, REDUCTIONS)}"
            )
        self.detector = Detector("image_geneval", detector, device)
        self.clip = None if clip is None else HfClip("image_geneval", clip, None, device)
        self.reduce = REDUCTIONS[reduce]
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_objects, self.max_overlap = max_objects, max_overlap
        self.rules = GenevalRules(position_threshold)
        self._named: dict[str, Tensor] = {}

    def __call__(
        self,
        images: list[Image.Image],
        include: list[Any],
        exclude: list[Any] | None = None,
        tag: list[str | None] | None = None,
        **_columns: Any,
    ) -> list[float | None]:
        """Score each picture; see the class."""
        excluded, tags = exclude or [None] * len(images), tag or [None] * len(images)
        rows = zip(images, include, excluded, tags, strict=True)
        return [
            None if wanted is None else self._score(image, wanted, unwanted or [], task)
            for image, wanted, unwanted, task in rows
        ]

    def _score(
        self, image: Image.Image, include: list[Any], exclude: list[Any], tag: str | None
    ) -> float:
        known = self.detector.classes
        specification = read_specification(include, exclude, known, GENEVAL_COLOURS)
        counts = any(entry.count > 1 for entry in specification.include)
        counting = counts if tag is None else tag == "counting"
        things = self._things(
            image, specification, self.counting_threshold if counting else self.threshold
        )
        return self.reduce(conditions(specification, things, self.rules, image.size))

    def _things(
        self, image: Image.Image, specification: Specification, threshold: float
    ) -> list[Thing]:
        """What is there of the classes that matter, with colours where they do."""
        entries = [*specification.include, *specification.exclude]
        classes = list(dict.fromkeys(entry.name for entry in entries))
        found = self.detector.detect(image, classes, threshold)
        things: list[Thing] = []
        for name in classes:
            own = [detection for detection in found if detection.name == name]
            own = without_overlap(own[: self.max_objects], self.max_overlap)
            coloured = max((e.count for e in entries if e.name == name and e.colour), default=0)
            colours = self._colours(image, own[:coloured], name)
            colours += [None] * (len(own) - len(colours))
            things += [Thing(name, c, d.box) for c, d in zip(colours, own, strict=True)]
        return things

    def _colours(
        self, image: Image.Image, found: Sequence[Detection], name: str
    ) -> list[str | None]:
        if not found:
            return []
        if self.clip is None:
            return [_plain_colour(image, detection) for detection in found]
        if name not in self._named:
            self._named[name] = self._colour_texts(self.clip, name)
        crops = [cut_out(image, detection) for detection in found]
        nearest_text = (self.clip.images(crops) @ self._named[name].T).argmax(dim=1)
        return [GENEVAL_COLOURS[index] for index in nearest_text.tolist()]

    @staticmethod
    def _colour_texts(clip: HfClip, name: str) -> Tensor:
        """``[colours, D]``: the mean embedding of each colour's texts."""
        texts = [
            template.replace("{colour}", colour).replace("{class}", name)
            for colour in GENEVAL_COLOURS
            for template in TEMPLATES
        ]
        embedded = clip.texts(texts).unflatten(0, (len(GENEVAL_COLOURS), len(TEMPLATES)))
        return torch.nn.functional.normalize(embedded.mean(dim=1), dim=-1)


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """Return what is in an object's box, blank outside its mask if it has one."""
    image = image.convert("RGB")
    if found.mask is not None:
        mask = Image.fromarray(found.mask.numpy().astype(np.uint8) * 255)
        image = Image.composite(image, Image.new("RGB", image.size, BLANK), mask)
    left, top, right, bottom = _whole(found, image.size)
    return image.crop((left, top, right, bottom))


def _plain_colour(image: Image.Image, found: Detection) -> str | None:
    left, top, right, bottom = _whole(found, image.size)
    pixels = np.asarray(image.convert("RGB"))[top:bottom, left:right]
    inside = None if found.mask is None else found.mask.numpy()[top:bottom, left:right]
    return dominant_colour(pixels, inside, GENEVAL_COLOURS)


def _whole(found: Detection, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box in whole pixels of the picture, one at least in each direction."""
    left = min(max(int(found.box[0]), 0), size[0] - 1)
    top = min(max(int(found.box[1]), 0), size[1] - 1)
    right = min(max(round(found.box[2]), left + 1), size[0])
    bottom = min(max(round(found.box[3]), top + 1), size[1])
    return left, top, right, bottom
