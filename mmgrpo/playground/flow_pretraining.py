"""Half-training a flow model: what the image and the video task share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Pretraining:
    """How a base model is trained, and how far.

    Attributes:
        steps: Optimiser steps.
        batch_size: Samples per step.
        learning_rate: Peak of a one-cycle schedule.
        wrong_rate: Probability that something the prompt names is drawn at random.
        empty_prompt_rate: Probability of an empty prompt, so that guidance has something to
            contrast with.
        padded_every: Every so many steps a quarter of the batch is trained with the zero tokens of
            a default pipeline call; a model that never met them is drowned in them. None: never.
        ema_decay: Decay of the weight average that is saved.
    """

    steps: int = 1600
    batch_size: int = 64
    learning_rate: float = 2e-3
    wrong_rate: float = 0.2
    empty_prompt_rate: float = 0.1
    padded_every: int | None = 8
    ema_decay: float = 0.99


def mislabel(values: Tensor, choices: int, rate: float, generator: torch.Generator) -> Tensor:
    """Replaces int64 values, each with probability ``rate``, by one of 0 ... ``choices - 1``."""
    wrong = torch.rand(values.shape, generator=generator) < rate
    return torch.where(wrong, torch.randint(0, choices, values.shape, generator=generator), values)


def matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], clean: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity ``noise - clean`` at uniformly drawn noise levels.

    Args:
        velocity: ``(states [B, ...], noise levels [B])`` to velocities ``[B, ...]``.
        clean: Latents ``[B, ...]``.
        generator: Source of all randomness.

    Returns:
        A scalar.
    """
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.rand(len(clean), generator=generator)
    level = sigma.view(-1, *[1] * (clean.dim() - 1))
    return F.mse_loss(velocity((1 - level) * clean + level * noise, sigma), noise - clean)


def fit(
    network: nn.Module,
    loss: Callable[[bool], Tensor],
    settings: Pretraining,
    *,
    progress: Progress | None = None,
    name: str = "image",
) -> None:
    """Trains the network in place and leaves the average of its weights in it.

    Args:
        network: The velocity model.
        loss: The loss of the next batch; told whether the step is a padded one.
        settings: How, and how far.
        progress: Receives a line of text now and then.
        name: Of the model in these lines.
    """
    network.train()
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema_decay)
    )
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    for step in range(settings.steps):
        value = loss(settings.padded_every is not None and step % settings.padded_every == 0)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if progress and (step + 1) % 100 == 0:
            progress(f"{name} model: step {step + 1}/{settings.steps}, loss {value.item():.3f}")
    network.load_state_dict(average.module.state_dict())
    network.eval()
