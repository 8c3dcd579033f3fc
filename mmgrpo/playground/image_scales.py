"""The next-scale task: draw "the number 42" as maps of codes, coarse to fine.

``build_image_scales`` writes a folder of our own next-scale generator, half a million weights,
and the prompts. It is half-trained on purpose: part of the pictures it learned from were of other
digits than their prompt said. The pictures have the format of the image task, whose classifiers
reward and judge them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmgrpo.config.scale_shape import ScaleShape
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.image import NUM_NUMBERS, DigitBook, all_prompts, is_held_out, write_rows
from mmgrpo.playground.sft import Progress, make_optimizers, warmup_cosine
from mmgrpo.playground.tiny_scale_vq import train_quantiser
from mmgrpo.policies.image_scales import ImageScalesPolicy
from mmgrpo.policies.scale_model import ScaleModel
from mmgrpo.protocols import Prompt

SHAPE = ScaleShape(
    scales=[[1, 1], [1, 2], [2, 4], [4, 8]],
    num_codes=64,
    code_dim=8,
    hidden_size=96,
    num_layers=4,
    num_heads=4,
    max_prompt_bytes=32,
)


@dataclass(frozen=True)
class Pretraining:
    """How the base model is trained, and how far.

    Attributes:
        steps: Optimiser steps.
        batch_size: Pictures per step.
        learning_rate: Peak of the schedule.
        wrong_digit_rate: Probability that a digit is drawn from a random class.
        vq_steps: Optimiser steps of the quantiser.
    """

    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    wrong_digit_rate: float = 0.15
    vq_steps: int = 1500


def build_model(seed: int) -> ScaleModel:
    """Makes an untrained model; the quantiser's decoder makes 8 x 16 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ScaleModel.make(SHAPE)


def pretrain(
    model: ScaleModel,
    settings: Pretraining,
    book: DigitBook,
    generator: torch.Generator,
    *,
    progress: Progress | None = None,
) -> None:
    """Trains the transformer in place by maximum likelihood, every scale counting the same.

    Args:
        model: With a trained quantiser.
        settings: How, and how far.
        book: The digits.
        generator: Source of all randomness.
        progress: Receives a line of text every hundred steps.
    """
    policy = ImageScalesPolicy(model, reference="none")
    rows = enumerate(all_prompts()[:NUM_NUMBERS])
    prompts = policy.encode([Prompt(index, text) for index, text in rows])
    optimizers = make_optimizers(model.transformer, settings.learning_rate)
    warmup = max(1, min(100, settings.steps // 10))
    weight = 1.0 / torch.tensor(SHAPE.lengths).repeat_interleave(torch.tensor(SHAPE.lengths))
    for step in range(settings.steps):
        asked = torch.randint(0, NUM_NUMBERS, (settings.batch_size,), generator=generator)
        canvases = book.draw(asked, settings.wrong_digit_rate, generator)
        codes = model.quantiser.encode(canvases.expand(-1, 3, -1, -1))
        logits = policy.logits(prompts, asked, codes)
        errors = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
        loss = (errors * weight).sum(dim=1).mean() / len(SHAPE.scales)
        model.transformer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.transformer.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup_cosine(step, settings.steps, warmup)
            optimizer.step()
        if progress is not None and (step + 1) % 100 == 0:
            progress(f"next-scale step {step + 1}/{settings.steps}, loss {loss.item():.4f}")


def build_image_scales(
    out_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    settings: Pretraining | None = None,
) -> None:
    """Builds the next-scale task: ``model/``, ``train.jsonl`` (80 numbers) and ``eval.jsonl``.

    Args:
        out_dir: The folder to write; made if missing.
        seed: Fixes weights and pictures.
        progress: Receives lines of text.
        settings: How far to train; the default takes some minutes.
    """
    settings, out = settings or Pretraining(), Path(out_dir)
    write_rows(out / "train.jsonl", (n for n in range(NUM_NUMBERS) if not is_held_out(n)))
    write_rows(out / "eval.jsonl", (n for n in range(NUM_NUMBERS) if is_held_out(n)))
    book, generator = DigitBook(*load_digits("train")), torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        wanted = torch.randint(0, NUM_NUMBERS, (count,), generator=generator)
        return book.draw(wanted, 0.0, generator)

    model = build_model(seed)
    train_quantiser(model.quantiser, draw, seed=seed, steps=settings.vq_steps)
    pretrain(model, settings, book, generator, progress=progress)
    model.save_pretrained(out / "model")
