"""The shapes task: draw "two red circles" or "a blue square left of a green triangle".

``build_shapes`` writes an ordinary ``StableDiffusion3Pipeline`` folder, half-trained by the recipe
of the image task, and the prompts with the conditions that pictures must meet. Neither reward nor
judge has weights, and they share no look at the picture: the reward compares each quarter, pixel
by pixel, with drawings of the shapes and gives the share of conditions met; the judge finds areas
of one colour anywhere, names them by their outline, and demands all conditions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import CLIPTokenizer

from mmgrpo.playground.flow_pretraining import Pretraining, Progress
from mmgrpo.playground.image_model import Design, build_pipeline
from mmgrpo.playground.pretraining import train_transformer
from mmgrpo.playground.shapes_codec import LATENTS, encode, train_codec
from mmgrpo.playground.shapes_drawing import (
    Group,
    Scene,
    all_groups,
    draw_cell,
    equal_scenes,
    pair_scenes,
    render,
    spoiled,
)

WORDS = ("a", "two", "three", "red", "green", "blue", "circle", "square", "triangle", "circles",
         "squares", "triangles", "left", "right", "of", "above", "below")  # fmt: skip
NUM_CLIP_TOKENS = 12  # eight words, start, end, and two of padding
NUM_T5_TOKENS = 9  # eight words and the end: ``max_sequence_length``
_VARIANTS = 32  # pictures per prompt that the base model learns from
_EVERY_PAIR = 7  # of 288 is asked for
_HELD_OUT = 5  # every fifth prompt is kept for evaluation


def build_clip_tokenizer() -> CLIPTokenizer:
    """Builds a CLIP tokenizer in which each word of the prompts is one token."""
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        model_max_length=NUM_CLIP_TOKENS,
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in WORDS])
    return tokenizer


SHAPES = Design(
    latents=LATENTS,
    patch_size=1,
    clip_tokenizer=build_clip_tokenizer,
    words=WORDS,
    num_t5_tokens=NUM_T5_TOKENS,
)
SHAPES_PRETRAINING = Pretraining(steps=1600, wrong_rate=0.15)
CODEC_STEPS = 1200


def asked_scenes() -> list[Scene]:
    """Returns what is asked for: the 27 scenes of equal shapes, and 42 pairs."""
    return equal_scenes() + pair_scenes()[::_EVERY_PAIR]


def is_held_out(number: int) -> bool:
    """Tells whether a scene of ``asked_scenes`` is kept for evaluation: 14 of 69 are."""
    return number % _HELD_OUT == 2


class PictureBook:
    """Latents of pictures of every scene, some of them spoiled, so that a batch is one lookup.

    Args:
        codec: Encodes the pictures.
        scenes: What is drawn.
        wrong_rate: Probability that a shape, colour, number or position is not what was asked for.
        seed: Fixes the pictures.
    """

    def __init__(
        self, codec: AutoencoderKL, scenes: Iterable[Scene], wrong_rate: float, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        pictures = [
            render(spoiled(scene, wrong_rate, rng)) for scene in scenes for _ in range(_VARIANTS)
        ]
        self.latents = encode(codec, np.stack(pictures)).unflatten(0, (-1, _VARIANTS))

    def draw(self, scenes: Tensor, generator: torch.Generator) -> Tensor:
        """Picks a random picture of each scene ``[B]`` (indices): latents ``[B, 4, 4, 4]``."""
        picks = torch.randint(0, _VARIANTS, scenes.shape, generator=generator)
        return self.latents[scenes, picks]


def write_rows(path: Path, scenes: Iterable[Scene]) -> None:
    """Writes one JSON line per scene."""
    path.write_text("".join(json.dumps(scene.row) + "\n" for scene in scenes), encoding="utf-8")


def write_templates(folder: Path) -> None:
    """Writes what a quarter may show, one PNG file each: nine shapes, and nothing."""
    folder.mkdir(exist_ok=True)
    shown: dict[str, Group | None] = {f"{g.colour}-{g.shape}": g for g in all_groups()}
    for name, group in {"blank": None, **shown}.items():
        Image.fromarray(draw_cell(group)).save(folder / f"{name}.png")


def build_shapes(
    out_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    pretraining: Pretraining = SHAPES_PRETRAINING,
    codec_steps: int = CODEC_STEPS,
) -> None:
    """Builds the shapes task: model, drawings to compare with, and prompts.

    Writes ``model/``, ``templates/``, ``train.jsonl`` (55 prompts) and ``eval.jsonl`` (the 14 held
    out of reinforcement learning; pre-training saw all).

    Args:
        out_dir: The folder to write; made if missing.
        seed: Fixes weights, pictures and batches.
        progress: Receives lines of text.
        pretraining: How far to train the model; the default takes some minutes.
        codec_steps: Optimiser steps of the autoencoder.
    """
    report = progress or (lambda _: None)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    asked = asked_scenes()
    write_rows(out / "train.jsonl", (s for n, s in enumerate(asked) if not is_held_out(n)))
    write_rows(out / "eval.jsonl", (s for n, s in enumerate(asked) if is_held_out(n)))
    write_templates(out / "templates")
    codec = train_codec(seed=seed, steps=codec_steps, progress=progress)
    pipeline = build_pipeline(seed, SHAPES, codec)
    train_transformer(
        pipeline,
        pretraining,
        [*(scene.prompt for scene in asked), ""],
        PictureBook(codec, asked, pretraining.wrong_rate, seed).draw,
        seed=seed,
        num_t5_tokens=NUM_T5_TOKENS,
        progress=progress,
    )
    pipeline.save_pretrained(out / "model")
    report(f"shapes task written to {out}")
