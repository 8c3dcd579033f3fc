"""The image task: draw a two-digit number in handwritten digits, asked for as "the number 42".

``build_image`` writes an ordinary ``StableDiffusion3Pipeline`` folder of half a million weights,
two digit classifiers (a reward and a held-out judge) and the prompts. The base model is half-
trained on purpose: part of the pictures it learned from showed other digits than their prompt said,
so what it draws are digits, but often the wrong ones. The right ones are among its samples, which
is what reinforcement learning needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from mmgrpo.playground.classifier import build_classifiers
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.flow_pretraining import Pretraining, Progress
from mmgrpo.playground.image_model import build_pipeline
from mmgrpo.playground.pretraining import train_transformer
from mmgrpo.playground.sft import write_jsonl

NUM_NUMBERS = 100


def prompt_row(number: int) -> dict[str, object]:
    """Returns the data row of a number: its prompt, and its digits as labels and as text."""
    answer = f"{number:02d}"
    return {
        "prompt": f"the number {answer}",
        "labels": [int(digit) for digit in answer],
        "answer": answer,
    }


def is_held_out(number: int) -> bool:
    """Tells whether a number is kept for evaluation.

    The rule picks 20 of 100 numbers such that every digit occurs twice at each place.
    """
    tens, units = divmod(number, 10)
    return (units - 3 * tens) % 5 == 0


def all_prompts() -> list[str]:
    """Returns the prompts of 00 ... 99 in order, and the empty prompt last."""
    return [str(prompt_row(number)["prompt"]) for number in range(NUM_NUMBERS)] + [""]


class DigitBook:
    """Training digits sorted by class, so that a batch of canvases is one lookup.

    Args:
        pixels: uint8 ``[N, 8, 8]``.
        labels: int64 ``[N]`` in 0 ... 9.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        order = np.argsort(labels, kind="stable")
        self.pictures = torch.from_numpy(pixels[order])
        self.counts = torch.bincount(torch.from_numpy(labels), minlength=10)
        self.starts = self.counts.cumsum(0) - self.counts

    def pick(self, digits: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a random picture of each digit: uint8 ``[..., 8, 8]`` for int64 ``[...]``."""
        counts = self.counts[digits]
        picks = (torch.rand(digits.shape, generator=generator) * counts).long()
        return self.pictures[self.starts[digits] + picks.clamp(max=counts - 1)]

    def draw(self, numbers: Tensor, wrong_digit_rate: float, generator: torch.Generator) -> Tensor:
        """Puts random digits side by side.

        Args:
            numbers: int64 ``[B]`` in 0 ... 99.
            wrong_digit_rate: Probability that a digit is of a random class.
            generator: Source of all randomness.

        Returns:
            Gray canvases ``[B, 1, 8, 16]`` in [-1, 1].
        """
        digits = torch.stack([numbers // 10, numbers % 10], dim=1)
        wrong = torch.rand(digits.shape, generator=generator) < wrong_digit_rate
        random_digits = torch.randint(0, 10, digits.shape, generator=generator)
        pictures = self.pick(torch.where(wrong, random_digits, digits), generator)
        canvases = torch.cat(pictures.unbind(1), dim=2)
        return canvases[:, None] / 127.5 - 1.0


def pretrain(
    pipeline: StableDiffusion3Pipeline,
    settings: Pretraining,
    *,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Trains the pipeline's transformer in place, on wrongly labelled canvases among others.

    Args:
        pipeline: The pipeline; only its transformer changes.
        settings: How, and how far.
        seed: Fixes the batches.
        progress: Receives a line of text now and then.
    """
    book = DigitBook(*load_digits("train"))
    train_transformer(
        pipeline,
        settings,
        all_prompts(),
        lambda numbers, generator: book.draw(numbers, settings.wrong_rate, generator),
        seed=seed,
        progress=progress,
    )


def write_rows(path: Path, numbers: Iterable[int]) -> None:
    """Writes one JSON line per number."""
    write_jsonl(path, map(prompt_row, numbers))


def build_image(
    out_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    pretraining: Pretraining | None = None,
    classifier_steps: int = 400,
) -> None:
    """Builds the image task: model, reward and judge classifiers, and prompts.

    Writes ``model/``, ``reward_classifier/``, ``judge_classifier/``, ``train.jsonl`` (80 numbers)
    and ``eval.jsonl`` (the 20 held out of reinforcement learning; pre-training saw all). The
    classifiers learn from disjoint digits, so that a drawing that merely fools the reward does not
    also convince the judge.

    Args:
        out_dir: The folder to write; made if missing.
        seed: Fixes weights, batches and augmentation.
        progress: Receives lines of text.
        pretraining: How far to train the model; the default takes one or two minutes.
        classifier_steps: Optimiser steps of each classifier.
    """
    report = progress or (lambda _: None)
    out = Path(out_dir)
    write_rows(out / "train.jsonl", (n for n in range(NUM_NUMBERS) if not is_held_out(n)))
    write_rows(out / "eval.jsonl", (n for n in range(NUM_NUMBERS) if is_held_out(n)))
    build_classifiers(out, seed=seed, steps=classifier_steps, report=report)
    pipeline = build_pipeline(seed)
    pretrain(pipeline, pretraining or Pretraining(), seed=seed, progress=progress)
    pipeline.save_pretrained(out / "model")
    report(f"image task written to {out}")
