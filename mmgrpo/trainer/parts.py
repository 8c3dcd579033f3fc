"""What a run is made of (parts) and where it stands (state)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from accelerate import Accelerator
from torch import Tensor, nn

from mmgrpo.core.aggregation import Denominators
from mmgrpo.core.collective import Collective
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.protocols import (
    AheadScorer,
    Evaluation,
    Policy,
    PromptSource,
    Request,
    Rollout,
    RolloutEngine,
    Sample,
    Scorer,
    Tracker,
    Weights,
)
from mmgrpo.trainer.optim import Optimizer


class SamplerLike(Protocol):
    """When to stop drawing prompts."""

    @property
    def valid_fraction(self) -> float:
        """Share of a batch's groups that must have spread."""
        ...

    @property
    def max_rounds(self) -> int:
        """Rounds of drawing at most."""
        ...


class MethodLike(Protocol):
    """What the loop reads of a method; see :class:`mmgrpo.methods.Method`."""

    @property
    def sampler(self) -> SamplerLike:
        """How prompts become a batch."""
        ...

    @property
    def reads_reference(self) -> bool:
        """Whether anything is compared with the reference's weights."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What the trainer has to provide."""
        ...

    @property
    def request(self) -> Request:
        """What it reads of an evaluation."""
        ...

    @property
    def per_decision(self) -> bool:
        """Whether the loss is a sum over decisions, in which their rows play no part."""
        ...

    def score(self, trajectories: Trajectories) -> Tensor:
        """Return the ``[B]`` weighted sum of the rewards."""
        ...

    def prepare(self, trajectories: Trajectories, *, collective: Collective) -> Trajectories:
        """Turn rewards into advantages."""
        ...

    def loss(
        self,
        log_prob: Tensor,
        trajectories: Trajectories,
        *,
        evaluation: Evaluation | None,
        total: Denominators | None,
    ) -> Loss:
        """Return a micro-batch's share of the loss."""
        ...


class Loss(Protocol):
    """See :class:`mmgrpo.methods.loss.LossOutput`."""

    @property
    def loss(self) -> Tensor:
        """Scalar to differentiate."""
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """Shares that sum to the update's means."""
        ...

    @property
    def max_log_ratio(self) -> float:
        """Largest absolute log-ratio."""
        ...


class Average(Weights, Protocol):
    """An exponential moving average of the trainable weights."""

    def applied(self) -> AbstractContextManager[None]:
        """Within the context, the network has the averaged weights."""
        ...


class History(Protocol):
    """Earlier rewards of each prompt; see :class:`mmgrpo.trainer.history.RewardHistory`."""

    def add(self, prompt: Tensor, score: Tensor, collective: Collective) -> tuple[Tensor, Tensor]:
        """Add rewards ``[B]``; return mean and standard deviation ``[B]`` of the prompts'."""
        ...

    def commit(self) -> None:
        """Keep what was added."""
        ...


class EntropyControl(Protocol):
    """See :class:`mmgrpo.core.entropy_control.EntropyControl`."""

    def weigh(self, trajectories: Trajectories, collective: Collective) -> Trajectories:
        """Say how much each decision's entropy counts in the loss."""
        ...

    def observe(self, trajectories: Trajectories, entropy: Tensor) -> None:
        """Take in the entropies of a micro-batch."""
        ...

    def update(self, collective: Collective) -> dict[str, float]:
        """Move the coefficients after an optimiser step; return numbers to report."""
        ...


@dataclass
class Evaluator:
    """Held-out prompts with their own sampling settings and judge.

    Attributes:
        engine: samples from the policy.
        scorer: the run's rewards and the judge.
        prompts: the held-out prompts.
        samples: per prompt.
        limit: use only the first prompts.
        seed: of the samples, the same at every evaluation.
        judge: name of the score whose mean is ``eval/success``.
        batch: most samples drawn at the same time.
    """

    engine: RolloutEngine
    scorer: Scorer
    prompts: PromptSource
    samples: int
    limit: int | None
    seed: int
    judge: str
    batch: int


@dataclass
class Parts:
    """Everything a step touches, seen through the protocols.

    ``old`` is the average that a method compares with in place of the last weights, and
    ``old_samples`` whether it draws the samples too.
    """

    policy: Policy
    method: MethodLike
    engine: RolloutEngine
    scorer: Scorer
    prompts: PromptSource
    accelerator: Accelerator
    collective: Collective
    network: nn.Module
    optimizer: Optimizer
    greedy_engine: RolloutEngine | None = None
    evaluator: Evaluator | None = None
    ema: Average | None = None
    history: History | None = None
    old: Average | None = None
    old_samples: bool = False
    entropy_control: EntropyControl | None = None
    trackers: Sequence[Tracker] = ()
    write_samples: Callable[..., Any] | None = None
    finish: Callable[[Path], Any] | None = None

    @property
    def second_weights(self) -> dict[str, Weights]:
        """The weights beside the network's own: the reference and the averages."""
        averages = {"ema": self.ema, "old": self.old}
        kept = {name: average for name, average in averages.items() if average is not None}
        return {"reference": self.policy.reference_weights, **kept}

    @property
    def old_weights(self) -> AbstractContextManager[None]:
        """The weights that the method compares with: the last, or their average."""
        return nullcontext() if self.old is None else self.old.applied()

    @property
    def sampling_weights(self) -> AbstractContextManager[None]:
        """The weights that draw the samples."""
        return self.old_weights if self.old_samples else nullcontext()

    @property
    def evaluation_weights(self) -> AbstractContextManager[None]:
        """The weights that are evaluated and exported: the average where there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()


@dataclass
class State:
    """Where a run stands; all of it is in the checkpoint.

    Attributes:
        step: training steps done.
        updates: optimiser steps done; also the version of the weights.
        draws: batches of prompts drawn.
        decisions: generated so far.
        seconds: that the steps took.
        metrics: of the last step.
    """

    step: int = 0
    updates: int = 0
    draws: int = 0
    decisions: float = 0.0
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Collected:
    """Rollouts of one step: row b of ``trajectories`` is ``samples[b]``.

    ``greedy`` has one deterministic sample per group, where the method needs it for a baseline;
    ``ahead`` has begun to score the samples.
    """

    trajectories: Trajectories
    samples: list[Sample]
    greedy: Rollout | None = None
    ahead: AheadScorer | None = None

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join."""
        trajectories = Trajectories.cat([part.trajectories for part in parts])
        return cls(trajectories, [sample for part in parts for sample in part.samples])
