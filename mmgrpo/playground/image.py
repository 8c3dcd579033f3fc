"""The image task: draw a two-digit number in handwritten digits, asked for as "the number 42".

``build_image`` writes an ordinary ``StableDiffusion3Pipeline`` folder of half a million weights,
two digit classifiers (a reward and a held-out judge) and the prompts. The base model is half-
trained on purpose: part of the pictures it learned from showed other digits than their prompt said,
so what it draws are digits, but often the wrong ones. The right ones are among its samples, which
is what reinforcement learning needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from mmgrpo.playground.classifier import digit_accuracy, save_classifier, train_classifier
from mmgrpo.playground.digits import Split, load_digits
from mmgrpo.playground.image_model import (
    DEFAULT_T5_TOKENS,
    SCALING_FACTOR,
    SHIFT_FACTOR,
    build_pipeline,
    encode_prompts,
)

Progress = Callable[[str], None]

NUM_NUMBERS = 100
# Role, the digits it learns from, and what is added to the seed.
_CLASSIFIERS: tuple[tuple[str, Split, int], ...] = (("reward", "train", 0), ("judge", "judge", 1))
_EMPTY_PROMPT = NUM_NUMBERS  # index of the empty prompt in ``all_prompts``


@dataclass(frozen=True)
class Pretraining:
    """How the base model is trained, and how far.

    Attributes:
        steps: Optimiser steps.
        batch_size: Canvases per step.
        learning_rate: Peak of a one-cycle schedule.
        wrong_digit_rate: Probability that a digit's picture is drawn from a random class.
        empty_prompt_rate: Probability of an empty prompt, so that guidance has something to
            contrast with.
        padded_every: Every so many steps a quarter of the batch is trained with the 256 zero
            tokens of a default pipeline call; a model that never met them is drowned in them.
        ema_decay: Decay of the weight average that is saved.
    """

    steps: int = 1600
    batch_size: int = 64
    learning_rate: float = 2e-3
    wrong_digit_rate: float = 0.2
    empty_prompt_rate: float = 0.1
    padded_every: int = 8
    ema_decay: float = 0.99


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
        digits = torch.where(wrong, random_digits, digits)
        counts = self.counts[digits]
        picks = (torch.rand(digits.shape, generator=generator) * counts).long()
        pictures = self.pictures[self.starts[digits] + picks.clamp(max=counts - 1)]
        canvases = torch.cat(pictures.unbind(1), dim=2)
        return canvases[:, None] / 127.5 - 1.0


def flow_matching_loss(
    transformer: SD3Transformer2DModel,
    clean: Tensor,
    states: Tensor,
    pooled: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity ``noise - clean`` at uniformly drawn noise levels.

    Args:
        transformer: The velocity model; its timestep is 1000 times the noise level.
        clean: Latents ``[B, 1, 8, 16]``.
        states: Prompt token states ``[B, T, 64]``.
        pooled: Pooled prompt states ``[B, 64]``.
        generator: Source of all randomness.

    Returns:
        A scalar.
    """
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.rand(len(clean), generator=generator)
    level = sigma[:, None, None, None]
    velocity = transformer(
        hidden_states=(1 - level) * clean + level * noise,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=1000 * sigma,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - clean)


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
    generator = torch.Generator().manual_seed(seed)
    book = DigitBook(*load_digits("train"))
    states, pooled = encode_prompts(pipeline, all_prompts())
    transformer = pipeline.transformer.train()
    average = torch.optim.swa_utils.AveragedModel(
        transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema_decay)
    )
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    for step in range(settings.steps):
        padded = step % settings.padded_every == 0
        batch_size = settings.batch_size // 4 if padded else settings.batch_size
        numbers = torch.randint(0, _EMPTY_PROMPT, (batch_size,), generator=generator)
        canvases = book.draw(numbers, settings.wrong_digit_rate, generator)
        clean = (canvases - SHIFT_FACTOR) * SCALING_FACTOR
        empty = torch.rand(len(numbers), generator=generator) < settings.empty_prompt_rate
        prompts = numbers.masked_fill(empty, _EMPTY_PROMPT)
        tokens = F.pad(states[prompts], (0, 0, 0, DEFAULT_T5_TOKENS if padded else 0))
        loss = flow_matching_loss(transformer, clean, tokens, pooled[prompts], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(transformer)
        if progress and (step + 1) % 100 == 0:
            progress(f"image model: step {step + 1}/{settings.steps}, loss {loss.item():.3f}")
    transformer.load_state_dict(average.module.state_dict())
    transformer.eval()


def write_rows(path: Path, numbers: Iterable[int]) -> None:
    """Writes one JSON line per number."""
    lines = [json.dumps(prompt_row(number)) for number in numbers]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "train.jsonl", (n for n in range(NUM_NUMBERS) if not is_held_out(n)))
    write_rows(out / "eval.jsonl", (n for n in range(NUM_NUMBERS) if is_held_out(n)))
    for role, split, offset in _CLASSIFIERS:
        classifier = train_classifier(split, seed=seed + offset, steps=classifier_steps)
        save_classifier(classifier, out / f"{role}_classifier")
        accuracy = digit_accuracy(classifier, "eval")
        report(f"{role} classifier: {accuracy:.3f} of unseen digits right")
    pipeline = build_pipeline(seed)
    pretrain(pipeline, pretraining or Pretraining(), seed=seed, progress=progress)
    pipeline.save_pretrained(out / "model")
    report(f"image task written to {out}")
