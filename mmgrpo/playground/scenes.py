"""Canvases of handwritten digits with a question about them: the data of the vision playground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from mmgrpo.playground.digits import Split, load_digits
from mmgrpo.playground.sft import write_jsonl

PATCH = 4
DIGIT_SIZE = 16
WIDE_CANVAS = (24, 56)
SMALL_CANVAS = (24, 24)
SEPARATE_SHARE = 0.25


def _join(digits: Sequence[int]) -> str:
    return "".join(map(str, digits))


# What each question asks for, and the careless way to answer it, given the digits from left to
# right. The careless answers stop before the work is done: one digit short, the first that comes
# to hand, the order as it was read.
QUESTIONS: dict[str, tuple[str, Callable[[Sequence[int]], str], Callable[[Sequence[int]], str]]] = {
    "sum": ("Sum?", lambda d: str(sum(d)), lambda d: str(sum(d[:-1]))),
    "largest": ("Largest?", lambda d: str(max(d)), lambda d: str(d[-1])),
    "sort": ("Sort?", lambda d: _join(sorted(d)), _join),
}


@dataclass(frozen=True)
class Scene:
    """Two or three digits at random places, and a question about them; sums are of two.

    Attributes:
        digits: The digits from left to right, or from the first image to the last.
        pictures: For each digit, its picture's index in the split.
        places: For each digit, the row and column of its upper left corner.
        separate: Whether every digit has an image of its own instead of sharing a wide canvas.
        question: A key of ``QUESTIONS``.
    """

    digits: tuple[int, ...]
    pictures: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    separate: bool
    question: str

    @property
    def num_images(self) -> int:
        """How many images show the scene."""
        return len(self.digits) if self.separate else 1

    @property
    def answer(self) -> str:
        """The correct answer."""
        return QUESTIONS[self.question][1](self.digits)

    def messages(self) -> list[dict[str, Any]]:
        """The chat prompt: one image part per image, then the question."""
        text = {"type": "text", "text": QUESTIONS[self.question][0]}
        return [{"role": "user", "content": [*self.num_images * [{"type": "image"}], text]}]

    def completion(self, *, careless: bool = False) -> str:
        """The digits read from left to right, then the answer, without the end token."""
        answer = QUESTIONS[self.question][2](self.digits) if careless else self.answer
        return f"<think>{_join(self.digits)}</think><answer>{answer}</answer>"


@cache
def _split(name: Split) -> tuple[np.ndarray, np.ndarray]:
    """Loads a split once: pictures ``[N, 8, 8]`` and labels ``[N]``."""
    return load_digits(name)


def draw_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draws a scene whose digits come from ``split``."""
    labels = _split(split)[1]
    question = str(rng.choice(list(QUESTIONS)))
    count = 2 if question == "sum" else int(rng.integers(2, 4))
    pictures = tuple(rng.integers(0, len(labels), size=count).tolist())
    separate = bool(rng.random() < SEPARATE_SHARE)
    return Scene(
        digits=tuple(int(labels[picture]) for picture in pictures),
        pictures=pictures,
        places=_draw_places(rng, count, separate),
        separate=separate,
        question=question,
    )


def _draw_places(
    rng: np.random.Generator, count: int, separate: bool
) -> tuple[tuple[int, int], ...]:
    """Draws non-overlapping corners on the patch grid, which keeps the smallest tower readable."""
    height, width = SMALL_CANVAS if separate else WIDE_CANVAS
    rows = rng.integers(0, (height - DIGIT_SIZE) // PATCH + 1, size=count) * PATCH
    if separate:
        columns = rng.integers(0, (width - DIGIT_SIZE) // PATCH + 1, size=count) * PATCH
    else:
        slack = (width - count * DIGIT_SIZE) // PATCH
        gaps = np.sort(rng.integers(0, slack + 1, size=count))
        columns = gaps * PATCH + np.arange(count) * DIGIT_SIZE
    return tuple(zip(rows.tolist(), columns.tolist(), strict=True))


def render(
    scene: Scene, split: Split, augment: np.random.Generator | None = None
) -> list[Image.Image]:
    """Draws the images of a scene, bright ink on black.

    Args:
        scene: What to show.
        split: Where its pictures come from.
        augment: If given, every digit is slightly turned, scaled and moved at random.

    Returns:
        One wide RGB image, or one small image per digit.
    """
    pictures = _split(split)[0]
    shape = SMALL_CANVAS if scene.separate else WIDE_CANVAS
    canvases = [np.zeros(shape, dtype=np.uint8) for _ in range(scene.num_images)]
    for index, (picture, (row, column)) in enumerate(
        zip(scene.pictures, scene.places, strict=True)
    ):
        canvas = canvases[index if scene.separate else 0]
        canvas[row : row + DIGIT_SIZE, column : column + DIGIT_SIZE] = enlarge(
            pictures[picture], augment
        )
    return [Image.fromarray(canvas).convert("RGB") for canvas in canvases]


def enlarge(picture: np.ndarray, augment: np.random.Generator | None = None) -> np.ndarray:
    """Enlarges an 8x8 picture to ``DIGIT_SIZE``, with a small random affine map if asked.

    Args:
        picture: uint8 ``[8, 8]``.
        augment: Source of the random map.

    Returns:
        uint8 ``[DIGIT_SIZE, DIGIT_SIZE]``.
    """
    ratio = picture.shape[0] / DIGIT_SIZE
    matrix, shift = np.eye(2) * ratio, np.zeros(2)
    if augment is not None:
        angle, stretch = augment.normal(0.0, 0.12), np.exp(augment.normal(0.0, 0.08, size=2))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix, shift = ratio * turn * stretch, augment.normal(0.0, 0.35, size=2)
    center_in, center_out = (picture.shape[0] - 1) / 2, (DIGIT_SIZE - 1) / 2
    offset = center_in - matrix @ np.full(2, center_out) + shift
    enlarged = ndimage.affine_transform(
        picture.astype(np.float32), matrix, offset, (DIGIT_SIZE, DIGIT_SIZE), order=1
    )
    return np.clip(np.rint(enlarged), 0, 255).astype(np.uint8)


def draw_scenes(seed: int, split: Split, count: int) -> list[Scene]:
    """Draws different scenes of one split; scenes of different splits never share a picture."""
    rng = np.random.default_rng([seed, 2, len(split)])
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[draw_scene(rng, split)] = None
    return list(scenes)


def write_scenes(folder: Path, name: str, scenes: list[Scene], split: Split) -> None:
    """Writes ``<name>.jsonl`` and the PNG files it refers to.

    Args:
        folder: Where the file and ``images/`` go.
        name: Also the first part of the image names.
        scenes: One row each.
        split: Where the pictures come from.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, number = [], 0
    for scene in scenes:
        paths = []
        for image in render(scene, split):
            paths.append(f"images/{name}-{number:06d}.png")
            image.save(folder / paths[-1], optimize=True)
            number += 1
        rows.append(
            {
                "prompt": scene.messages(),
                "images": paths,
                "answer": scene.answer,
                "task": scene.question,
                "digits": list(scene.digits),
            }
        )
    write_jsonl(folder / f"{name}.jsonl", rows)
