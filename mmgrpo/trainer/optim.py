"""Optimiser and learning-rate schedule, a pure function of the number of updates done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters."""
    return torch.optim.AdamW(
        list(parameters), lr=learning_rate, betas=betas, weight_decay=weight_decay
    )


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def learning_rate_at(
    update: int, *, base: float, schedule: str, warmup: int, total: int
) -> float:
    """Learning rate of the update with number ``update`` (from 0) out of ``total``."""
    if update < warmup:
        return base * (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, total - warmup)
    return base * SCHEDULES[schedule](progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
