"""What a run is made of (parts) and where it stands (state)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from mmgrpo.core.collective import Collective
from mmgrpo.protocols import Policy, PromptSource, RolloutEngine, Sample, Scorer, Tracker, Weights


class MethodLike(Protocol):
    """What the loop reads of a method; see :class:`mmgrpo.methods.Method`."""

    id: str
    needs: frozenset[str]
    request: Any
    sampler: Any
    prepare: Callable[..., Any]
    loss: Callable[..., Any]
    score: Callable[..., Any]


class Average(Weights, Protocol):
    """An exponential moving average of the trainable weights."""

    def applied(self) -> AbstractContextManager[None]: ...


@dataclass
class Evaluator:
    """Held-out prompts with their own sampling settings and judge."""

    engine: RolloutEngine
    scorer: Scorer
    prompts: PromptSource
    samples: int
    limit: int | None
    seed: int
    judge: str


@dataclass
class Parts:
    """Everything a step touches, seen through the protocols."""

    policy: Policy
    method: MethodLike
    engine: RolloutEngine
    scorer: Scorer
    prompts: PromptSource
    accelerator: Accelerator
    collective: Collective
    network: nn.Module
    optimizer: torch.optim.Optimizer
    greedy_engine: RolloutEngine | None = None
    evaluator: Evaluator | None = None
    ema: Average | None = None
    trackers: Sequence[Tracker] = ()
    write_samples: Callable[..., None] | None = None
    finish: Callable[[Path], None] | None = None

    @property
    def second_weights(self) -> dict[str, Weights]:
        """Everything beside the network's own weights that moves, or must survive a crash."""
        average = {} if self.ema is None else {"ema": self.ema}
        return {"reference": self.policy.reference_weights, **average}

    @property
    def evaluation_weights(self) -> AbstractContextManager[None]:
        """The weights that evaluation samples with: the EMA's where there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()


@dataclass
class State:
    """Where a run stands; all of it is in the checkpoint.

    Attributes:
        step: training steps done.
        updates: optimiser steps done; also the version of the weights.
        draws: batches of prompts drawn.
    """

    step: int = 0
    updates: int = 0
    draws: int = 0


@dataclass
class Collected:
    """Rollouts of one step with their rewards."""

    trajectories: Any
    samples: list[Sample]
