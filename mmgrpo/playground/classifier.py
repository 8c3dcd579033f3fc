"""Digit classifiers that score drawn numbers: one is the reward, the other the held-out judge.

Both are ordinary ``transformers`` image-classification folders: a reward that loads
``AutoModelForImageClassification`` and ``AutoImageProcessor`` needs nothing from this file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmgrpo.playground.digits import Split, load_digits

DIGIT_SIZE = 8
INPUT_SIZE = 32  # a ResNet stem divides the resolution by four
# Role, the digits it learns from, and what is added to the seed.
_ROLES: tuple[tuple[str, Split, int], ...] = (("reward", "train", 0), ("judge", "judge", 1))


def classifier_config() -> ResNetConfig:
    """Returns a small two-stage ResNet for digits enlarged to 32x32."""
    names = {digit: str(digit) for digit in range(10)}
    return ResNetConfig(
        num_channels=3,
        embedding_size=16,
        hidden_sizes=[24, 48],
        depths=[1, 1],
        layer_type="basic",
        id2label=names,
        label2id={name: digit for digit, name in names.items()},
    )


def to_rgb(gray: np.ndarray) -> Tensor:
    """Turns uint8 ``[N, H, W]`` into float ``[N, 3, H, W]`` in [0, 1] with three equal channels."""
    pixels = torch.from_numpy(gray.astype(np.float32) / 255.0)
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


def prepare(digits: Tensor) -> Tensor:
    """Does in tensors what the saved image processor does: enlarge, and map [0, 1] to [-1, 1]."""
    large = F.interpolate(digits, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear")
    return large * 2.0 - 1.0


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts by up to one pixel, changes the contrast, and adds noise.

    A generator's digits are fainter, off-centre and grainy compared with scanned ones; without this
    a classifier would be confident about the scans and arbitrary about the samples.

    Args:
        images: ``[B, 3, 8, 8]`` in [0, 1].
        generator: Source of all randomness.

    Returns:
        Augmented images of the same shape, in [0, 1].
    """
    batch = len(images)
    rows, columns = torch.randint(0, 3, (2, batch), generator=generator)
    padded = F.pad(images, (1, 1, 1, 1))
    span = torch.arange(DIGIT_SIZE)
    row_index = (rows[:, None] + span)[:, :, None]
    column_index = (columns[:, None] + span)[:, None, :]
    sample_index = torch.arange(batch)[:, None, None]
    shifted = padded[sample_index, :, row_index, column_index].permute(0, 3, 1, 2)
    gain = 0.6 + 0.6 * torch.rand(batch, 1, 1, 1, generator=generator)
    grain = 0.2 * torch.rand(batch, 1, 1, 1, generator=generator)
    noise = torch.randn(batch, 1, DIGIT_SIZE, DIGIT_SIZE, generator=generator)
    return (shifted * gain + grain * noise).clamp(0.0, 1.0)


def train_classifier(
    split: Split,
    *,
    seed: int,
    steps: int = 400,
    batch_size: int = 64,
) -> ResNetForImageClassification:
    """Trains a digit classifier on one split of the handwritten digits.

    Args:
        split: Name of the digit split; the reward uses ``train`` and the judge uses ``judge``.
        seed: Fixes the initial weights, the batches and the augmentation.
        steps: Optimiser steps.
        batch_size: Digits per step.

    Returns:
        The classifier in evaluation mode.
    """
    pixels, labels = load_digits(split)
    images, targets = to_rgb(pixels), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetForImageClassification(classifier_config())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(0, len(images), (batch_size,), generator=generator)
        logits = model(pixel_values=prepare(augment(images[index], generator))).logits
        loss = F.cross_entropy(logits, targets[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def save_classifier(model: ResNetForImageClassification, folder: str | Path) -> None:
    """Writes weights, configuration and image processor as a ``transformers`` folder."""
    model.save_pretrained(folder)
    processor = ViTImageProcessorPil(
        size={"height": INPUT_SIZE, "width": INPUT_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    processor.save_pretrained(folder)


def build_classifiers(out: Path, *, seed: int, steps: int, report: Callable[[str], None]) -> None:
    """Trains the reward and the judge and writes ``reward_classifier/``, ``judge_classifier/``.

    They learn from disjoint digits, so that a drawing that merely fools the reward does not also
    convince the judge.

    Args:
        out: Where the two folders go.
        seed: Fixes weights, batches and augmentation; the judge's differ from the reward's.
        steps: Optimiser steps of each.
        report: Receives a line of text for each.
    """
    for role, split, offset in _ROLES:
        classifier = train_classifier(split, seed=seed + offset, steps=steps)
        save_classifier(classifier, out / f"{role}_classifier")
        accuracy = digit_accuracy(classifier, "eval")
        report(f"{role} classifier: {accuracy:.3f} of unseen digits right")


@torch.no_grad()
def digit_accuracy(model: ResNetForImageClassification, split: Split) -> float:
    """Returns the share of a split's digits that the classifier names correctly."""
    pixels, labels = load_digits(split)
    predicted = model(pixel_values=prepare(to_rgb(pixels))).logits.argmax(-1)
    return (predicted == torch.from_numpy(labels)).float().mean().item()


@torch.no_grad()
def read_digits(model: ResNetForImageClassification, images: Tensor) -> Tensor:
    """Classifies every digit of a batch of canvases.

    Args:
        model: A digit classifier.
        images: ``[B, 3, 8, 8 * D]`` in [0, 1], digits side by side.

    Returns:
        Probabilities ``[B, D, 10]``, left digit first.
    """
    digits = images.unfold(3, DIGIT_SIZE, DIGIT_SIZE).permute(0, 3, 1, 2, 4)
    logits = model(pixel_values=prepare(digits.flatten(0, 1))).logits
    return logits.softmax(-1).unflatten(0, digits.shape[:2])
