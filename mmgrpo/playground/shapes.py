"""The shapes task: draw "two red circles" or "a blue square left of a green circle".

``build_shapes`` writes an ordinary ``StableDiffusion3Pipeline`` folder, half-trained by the recipe
of the image task, and the prompts with the conditions that pictures must meet. Neither reward nor
judge has weights: the reward finds areas of one colour and names them by their outline, and gives
the share of conditions met; the judge compares each quarter of the picture, pixel by pixel, with
drawings of the shapes, and demands all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import CLIPTokenizer

from mmgrpo.playground.flow_pretraining import Pretraining, Progress
from mmgrpo.playground.image_model import Design, build_pipeline
from mmgrpo.playground.pretraining import train_transformer
from mmgrpo.playground.shapes_drawing import (
    SIZE,
    Group,
    Scene,
    all_groups,
    all_scenes,
    render,
    spoiled,
    template,
)

WORDS = ("a", "two", "three", "red", "green", "blue", "circle", "square", "triangle", "circles",
         "squares", "triangles", "left", "right", "of", "above", "below")  # fmt: skip
NUM_CLIP_TOKENS = 12  # eight words, start, end, and two of padding
NUM_T5_TOKENS = 9  # eight words and the end: ``max_sequence_length``
_VARIANTS = 16  # pictures per prompt that the base model learns from
_EVERY_PAIR = 11  # of 288 is asked for: pairs are hard, and would be most of all prompts
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
    height=SIZE,
    width=SIZE,
    channels=3,
    patch_size=4,
    shift_factor=-0.878,
    scaling_factor=2.428,
    clip_tokenizer=build_clip_tokenizer,
    words=WORDS,
    num_t5_tokens=NUM_T5_TOKENS,
)
PRETRAINING = (
    Pretraining(steps=1600, batch_size=32, wrong_rate=0.1),
    Pretraining(steps=1200, batch_size=32, wrong_rate=0.1),
)
"""Rounds: the learning rate rises and falls in each."""


def asked_scenes() -> list[Scene]:
    """Returns what reinforcement learning asks for: the 27 scenes of equal shapes, and 27 pairs."""
    scenes = all_scenes()
    equal = [scene for scene in scenes if scene.relation is None]
    return equal + scenes[len(equal) :: _EVERY_PAIR]


def is_held_out(number: int) -> bool:
    """Tells whether a scene of ``asked_scenes`` is kept for evaluation: 11 of 54 are."""
    return number % _HELD_OUT == 2


class PictureBook:
    """Pictures of every scene, some of them spoiled, so that a batch is one lookup.

    Args:
        scenes: What is drawn.
        wrong_rate: Probability that a shape, colour, number or position is not what was asked for.
        seed: Fixes the pictures.
    """

    def __init__(self, scenes: Iterable[Scene], wrong_rate: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        pictures = [
            [render(spoiled(scene, wrong_rate, rng)) for _ in range(_VARIANTS)] for scene in scenes
        ]
        self.pictures = torch.from_numpy(np.array(pictures)).permute(0, 1, 4, 2, 3)

    def draw(self, scenes: Tensor, generator: torch.Generator) -> Tensor:
        """Picks a random picture of each scene.

        Args:
            scenes: int64 ``[B]`` indices.
            generator: Source of all randomness.

        Returns:
            ``[B, 3, 24, 24]`` in [-1, 1].
        """
        picks = torch.randint(0, _VARIANTS, scenes.shape, generator=generator)
        return self.pictures[scenes, picks] / 127.5 - 1.0


def write_rows(path: Path, scenes: Iterable[Scene]) -> None:
    """Writes one JSON line per scene."""
    path.write_text("".join(json.dumps(scene.row) + "\n" for scene in scenes), encoding="utf-8")


def write_templates(folder: Path) -> None:
    """Writes what a quarter may show, one PNG file each: nine shapes, and nothing."""
    folder.mkdir(exist_ok=True)
    shown: dict[str, Group | None] = {f"{g.colour}-{g.shape}": g for g in all_groups()}
    for name, group in {"blank": None, **shown}.items():
        Image.fromarray(template(group)).save(folder / f"{name}.png")


def build_shapes(
    out_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    pretraining: Sequence[Pretraining] = PRETRAINING,
) -> None:
    """Builds the shapes task: model, the judge's drawings, and prompts.

    Writes ``model/``, ``judge_templates/``, ``train.jsonl`` (43 prompts) and ``eval.jsonl`` (the 11
    held out of reinforcement learning). Pre-training saw all 315 scenes.

    Args:
        out_dir: The folder to write; made if missing.
        seed: Fixes weights, pictures and batches.
        progress: Receives lines of text.
        pretraining: How far to train the model, in rounds; the default takes some minutes.
    """
    report = progress or (lambda _: None)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    scenes, asked = all_scenes(), asked_scenes()
    write_rows(out / "train.jsonl", (s for n, s in enumerate(asked) if not is_held_out(n)))
    write_rows(out / "eval.jsonl", (s for n, s in enumerate(asked) if is_held_out(n)))
    write_templates(out / "judge_templates")
    pipeline = build_pipeline(seed, SHAPES)
    prompts = [*(scene.prompt for scene in scenes), ""]
    for number, settings in enumerate(pretraining):
        train_transformer(
            pipeline,
            settings,
            prompts,
            PictureBook(scenes, settings.wrong_rate, seed).draw,
            seed=seed + number,
            num_t5_tokens=SHAPES.num_t5_tokens,
            progress=progress,
        )
    pipeline.save_pretrained(out / "model")
    report(f"shapes task written to {out}")
