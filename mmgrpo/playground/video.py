"""The video task: a handwritten digit crosses the canvas, asked for as "the digit 7 moves right".

``build_video`` writes an ordinary ``WanPipeline`` folder of a fifth of a million weights, two digit
classifiers (a reward and a held-out judge) and the prompts. The base model is half-trained on
purpose: part of the clips it learned from showed another digit or another direction than their
prompt said.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from mmgrpo.playground.classifier import DIGIT_SIZE, build_classifiers
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.flow_pretraining import (
    Pretraining,
    Progress,
    fit,
    matching_loss,
    mislabel,
)
from mmgrpo.playground.image import DigitBook
from mmgrpo.playground.sft import write_jsonl
from mmgrpo.playground.video_model import (
    DIRECTIONS,
    LATENT_MEAN,
    LATENT_STD,
    NUM_FRAMES,
    SIZE,
    build_pipeline,
    encode_prompts,
)

Motion = tuple[int, str]
"""A digit and where it goes."""

MOTIONS: list[Motion] = [(digit, way) for digit in range(10) for way in DIRECTIONS]
VIDEO_PRETRAINING = Pretraining(steps=1000, padded_every=None)
_EMPTY_PROMPT = len(MOTIONS)  # index of the empty prompt in ``all_prompts``
_MARGIN = SIZE - DIGIT_SIZE


def prompt_row(motion: Motion) -> dict[str, object]:
    """Returns the data row of a motion: its prompt, its digit and its direction."""
    digit, way = motion
    return {"prompt": f"the digit {digit} moves {way}", "digit": digit, "direction": way}


def is_held_out(motion: Motion) -> bool:
    """Tells whether a motion is kept for evaluation: every digit once, 10 of 40."""
    digit, way = motion
    return DIRECTIONS.index(way) == digit % len(DIRECTIONS)


def all_prompts() -> list[str]:
    """Returns the prompts of ``MOTIONS`` in order, and the empty prompt last."""
    return [str(prompt_row(motion)["prompt"]) for motion in MOTIONS] + [""]


def animate(pictures: Tensor, ways: Tensor) -> Tensor:
    """Moves each picture across the middle of the canvas, a quarter of it a frame.

    Args:
        pictures: uint8 ``[B, 8, 8]``.
        ways: int64 ``[B]``, indices of ``DIRECTIONS``.

    Returns:
        Gray clips ``[B, 1, 3, 16, 16]`` in [-1, 1].
    """
    forth = torch.linspace(0, _MARGIN, NUM_FRAMES).long()
    middle = torch.full_like(forth, _MARGIN // 2)
    back = forth.flip(0)
    tops = torch.stack([middle, middle, forth, back])[ways]
    lefts = torch.stack([forth, back, middle, middle])[ways]
    clips = torch.zeros(len(pictures), NUM_FRAMES, SIZE, SIZE)
    span = torch.arange(DIGIT_SIZE)
    clips[
        torch.arange(len(pictures))[:, None, None, None],
        torch.arange(NUM_FRAMES)[None, :, None, None],
        (tops[..., None] + span)[..., None],
        (lefts[..., None] + span)[..., None, :],
    ] = pictures[:, None].float()
    return clips[:, None] / 127.5 - 1.0


def draw(book: DigitBook, motions: Tensor, wrong_rate: float, generator: torch.Generator) -> Tensor:
    """Draws clips of motions ``[B]`` (indices of ``MOTIONS``); some digits and ways are wrong."""
    ways = mislabel(motions % len(DIRECTIONS), len(DIRECTIONS), wrong_rate, generator)
    digits = mislabel(motions // len(DIRECTIONS), 10, wrong_rate, generator)
    return animate(book.pick(digits, generator), ways)


def pretrain(
    pipeline: WanPipeline,
    settings: Pretraining,
    *,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Trains the pipeline's transformer in place, on wrongly labelled clips among others.

    Args:
        pipeline: The pipeline; only its transformer changes.
        settings: How, and how far.
        seed: Fixes the batches.
        progress: Receives a line of text now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    book = DigitBook(*load_digits("train"))
    states = encode_prompts(pipeline, all_prompts())

    def loss(_padded: bool) -> Tensor:
        size = settings.batch_size
        motions = torch.randint(0, _EMPTY_PROMPT, (size,), generator=generator)
        clips = draw(book, motions, settings.wrong_rate, generator)
        empty = torch.rand(size, generator=generator) < settings.empty_prompt_rate
        tokens = states[motions.masked_fill(empty, _EMPTY_PROMPT)]

        def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
            out: Tensor = pipeline.transformer(noisy, 1000 * sigma, tokens, return_dict=False)[0]
            return out

        return matching_loss(velocity, (clips - LATENT_MEAN) / LATENT_STD, generator)

    fit(pipeline.transformer, loss, settings, progress=progress, name="video")


def build_video(
    out_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    pretraining: Pretraining | None = None,
    classifier_steps: int = 400,
) -> None:
    """Builds the video task: model, reward and judge classifiers, and prompts.

    Writes ``model/``, ``reward_classifier/``, ``judge_classifier/``, ``train.jsonl`` (30 motions)
    and ``eval.jsonl`` (the 10 held out of reinforcement learning; pre-training saw all).

    Args:
        out_dir: The folder to write; made if missing.
        seed: Fixes weights, batches and augmentation.
        progress: Receives lines of text.
        pretraining: How far to train the model; the default takes a few minutes.
        classifier_steps: Optimiser steps of each classifier.
    """
    report = progress or (lambda _: None)
    out = Path(out_dir)
    write_jsonl(out / "train.jsonl", (prompt_row(m) for m in MOTIONS if not is_held_out(m)))
    write_jsonl(out / "eval.jsonl", (prompt_row(m) for m in MOTIONS if is_held_out(m)))
    build_classifiers(out, seed=seed, steps=classifier_steps, report=report)
    pipeline = build_pipeline(seed)
    pretrain(pipeline, pretraining or VIDEO_PRETRAINING, seed=seed, progress=progress)
    pipeline.save_pretrained(out / "model")
    report(f"video task written to {out}")
