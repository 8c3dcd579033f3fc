"""The mask playground: segment one of the handwritten digits on a canvas, in few mask tokens.

A prompt shows two or three digits and asks for the first, second or third from the left; a
completion is its mask as codes, coarse to fine, any number from 1 to 32::

    <mask><m17><m4><m60></mask>

The base model is the vision playground's, taught twice: by short masks of the right digit, then by
demonstrations that often show another digit and have any number of codes. Reinforcement learning
has to point at the right one and to stop where further codes, which are hard to predict, would
spoil the mask. Evaluation uses pictures of digits that no training has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from mmgrpo.config.paths import locate
from mmgrpo.core.mask_codec import MaskCodec, MaskCodecConfig
from mmgrpo.playground.digits import Split
from mmgrpo.playground.mask_codec import save_codec, train_codec
from mmgrpo.playground.scenes import DIGIT_SIZE, WIDE_CANVAS, Scene, draw_scene, render
from mmgrpo.playground.sft import (
    IGNORED_LABEL,
    Progress,
    save_model_folder,
    supervise,
    write_jsonl,
)

CODEC = MaskCodecConfig(canvas=WIDE_CANVAS)
INK = 96
"""Brightness above which a pixel belongs to its digit."""
NUM_TRAIN = 320
NUM_EVAL = 96


@dataclass(frozen=True)
class Lesson:
    """A stretch of supervised steps.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Peak rate.
        wrong_share: How many of the demonstrations show another digit than they are asked for.
        most_codes: Their lengths are uniform from 1 to this.
        batch_size: Demonstrations per step.
    """

    steps: int
    learning_rate: float
    wrong_share: float
    most_codes: int
    batch_size: int = 32


LESSONS = (
    Lesson(400, 3e-3, wrong_share=0.0, most_codes=3),
    Lesson(100, 1e-3, wrong_share=0.5, most_codes=16),
)


@dataclass(frozen=True)
class Course:
    """How far to train.

    Attributes:
        lessons: Of the base model, in order.
        codec_steps: Optimiser steps of the codec.
        codec_masks: Masks that it learns.
    """

    lessons: tuple[Lesson, ...] = LESSONS
    codec_steps: int = 1500
    codec_masks: int = 16384


def draw_mask_scene(rng: np.random.Generator, split: Split) -> tuple[Scene, int]:
    """Draws a canvas of digits, and the index of the one to segment."""
    while (scene := draw_scene(rng, split)).separate:
        pass
    return scene, int(rng.integers(len(scene.digits)))


def mask_of(scene: Scene, target: int, canvas: np.ndarray) -> np.ndarray:
    """Cuts a digit's mask out of the scene's picture.

    Args:
        scene: What is shown.
        target: Index of the digit.
        canvas: uint8 ``[H, W]`` or ``[H, W, 3]``, the picture.

    Returns:
        bool ``[H, W]``.
    """
    ink = canvas.reshape(*canvas.shape[:2], -1)[..., 0] > INK
    row, column = scene.places[target]
    window = np.zeros_like(ink)
    window[row : row + DIGIT_SIZE, column : column + DIGIT_SIZE] = True
    return ink & window


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Writes a mask ``[H, W]`` as COCO's uncompressed run lengths: down the columns, 0 first."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff([0, *changes, mask.size])
    return {"size": list(mask.shape), "counts": counts.tolist()}


def messages(target: int) -> list[dict[str, Any]]:
    """The chat prompt; digits are counted from 1."""
    text = {"type": "text", "text": f"Mask {target + 1}?"}
    return [{"role": "user", "content": [{"type": "image"}, text]}]


def draw_masks(rng: np.random.Generator, count: int) -> Tensor:
    """Draws training masks of single digits, float32 ``[count, H, W]``."""
    masks: list[np.ndarray] = []
    while len(masks) < count:
        scene, _ = draw_mask_scene(rng, "train")
        canvas = np.asarray(render(scene, "train", augment=rng)[0])
        masks += [mask_of(scene, target, canvas) for target in range(len(scene.digits))]
    return torch.from_numpy(np.stack(masks[:count])).float()


def write_mask_scenes(folder: Path, name: Split, count: int, seed: int) -> None:
    """Writes ``<name>.jsonl`` and its pictures; the raw mask is the column ``mask``."""
    rng = np.random.default_rng([seed, 3, len(name)])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        scene, target = draw_mask_scene(rng, name)
        picture, path = render(scene, name)[0], f"images/{name}-{number:06d}.png"
        picture.save(folder / path, optimize=True)
        mask = mask_of(scene, target, np.asarray(picture))
        rows.append({"prompt": messages(target), "images": [path], "mask": run_lengths(mask)})
    write_jsonl(folder / f"{name}.jsonl", rows)


class Teacher:
    """Draws demonstrations; see the module."""

    def __init__(
        self, processor: Any, codec: MaskCodec, lesson: Lesson, rng: np.random.Generator
    ) -> None:
        """Args: encode the pictures, encodes the masks, what to teach, and what decides it."""
        self.processor, self.codec, self.lesson, self.rng = processor, codec, lesson, rng

    def batch(self) -> dict[str, Tensor]:
        """Draws and encodes demonstrations; ``labels [B, L]`` cover completions only."""
        prompts, images, masks = [], [], []
        for _ in range(self.lesson.batch_size):
            scene, asked = draw_mask_scene(self.rng, "train")
            shown = asked
            if self.rng.random() < self.lesson.wrong_share:
                shown = (asked + int(self.rng.integers(1, len(scene.digits)))) % len(scene.digits)
            images += render(scene, "train", augment=self.rng)
            masks.append(mask_of(scene, shown, np.asarray(images[-1])))
            prompts.append(
                self.processor.apply_chat_template(
                    messages(asked), tokenize=False, add_generation_prompt=True
                )
            )
        texts = map(self._text, prompts, self.codec.encode(torch.from_numpy(np.stack(masks))))
        return self._encode([*texts], images)

    def _text(self, prompt: str, codes: Tensor) -> str:
        count = int(self.rng.integers(1, self.lesson.most_codes + 1))
        completion = self.codec.config.text(codes[:count].tolist())
        return f"{prompt}{completion}{self.processor.tokenizer.eos_token}"

    def _encode(self, texts: list[str], images: list[Any]) -> dict[str, Tensor]:
        batch = dict(
            self.processor(
                text=texts, images=images, return_tensors="pt", padding=True, padding_side="right"
            )
        )
        ids = batch["input_ids"]
        start = ids == self.processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
        is_completion = (start.cumsum(1) > 0) & ~start & (batch["attention_mask"] > 0)
        batch["labels"] = ids.masked_fill(~is_completion, IGNORED_LABEL)
        return batch


def extend_model(seed: int) -> tuple[Qwen2VLForConditionalGeneration, Any]:
    """Loads the shipped vision model and its processor, with mask tokens in the vocabulary."""
    folder = locate("playground:vision/model")
    processor = AutoProcessor.from_pretrained(folder)
    codes = [CODEC.token.format(code) for code in range(CODEC.num_codes)]
    tokens = [AddedToken(t, special=False, normalized=False) for t in (CODEC.start, CODEC.end)]
    tokens += [AddedToken(t, special=False, normalized=False) for t in codes]
    processor.tokenizer.add_tokens(tokens)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return model, processor


def build_masks(
    out_dir: str | Path,
    *,
    seed: int = 0,
    course: Course | None = None,
    progress: Progress | None = None,
) -> None:
    """Builds the mask playground: ``model/``, ``codec/``, ``train.jsonl``, ``eval.jsonl``, images.

    Args:
        out_dir: Created if missing.
        seed: Decides data and weights.
        course: How far to train; the default takes about two minutes.
        progress: Receives lines of text.
    """
    course, folder = course or Course(), Path(out_dir)
    write_mask_scenes(folder, "train", NUM_TRAIN, seed)
    write_mask_scenes(folder, "eval", NUM_EVAL, seed)
    masks = draw_masks(np.random.default_rng([seed, 2]), course.codec_masks)
    codec = train_codec(CODEC, masks, seed=seed, steps=course.codec_steps)
    save_codec(folder / "codec", codec)
    model, processor = extend_model(seed)
    rng = np.random.default_rng([seed, 1])
    for lesson in course.lessons:
        supervise(
            model,
            Teacher(processor, codec, lesson, rng).batch,
            steps=lesson.steps,
            learning_rate=lesson.learning_rate,
            progress=progress,
        )
    save_model_folder(folder / "model", model, processor)
