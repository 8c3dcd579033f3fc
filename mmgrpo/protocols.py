"""The seams: what the loop asks of a policy, an engine, a reward and a source of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from mmgrpo.core.trajectories import Trajectories

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One row of a data set.

    Attributes:
        index: position of the row in the data set; names the group.
        content: plain text, or chat messages in the Hugging Face format.
        images: the prompt's images, in the order in which the content refers to them; decoded
            when indexed, so a large data set costs its compressed bytes only. With images, the
            content is chat messages with exactly one ``{"type": "image"}`` part for each; but an
            editing model has plain text beside the image.
        columns: every other column of the row; the rewards receive them.
        source: where the row stands (``file:line``), for error messages.
    """

    index: int
    content: str | list[Message]
    images: Sequence[Image] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def place(self) -> str:
        """How an error names the row."""
        return self.source or f"Row {self.index}"


@dataclass(frozen=True)
class Sample:
    """One generation, as rewards, transcripts and image grids see it.

    One of ``completion`` (text), ``image`` and ``video`` (frames in order) is set; an image that
    the model planned in words first has the plan as its ``completion``. ``length`` is the number of
    sampled tokens, for rewards that look at it. ``mismatch`` describes the tokens about which a
    separate engine and the policy disagree most. ``self_answers`` are what an image-token model
    says about its own image, one for each of the prompt's questions; none where it was not asked.
    """

    prompt: Prompt
    completion: str | None = None
    image: Image | None = None
    video: Sequence[Image] | None = None
    truncated: bool = False
    length: int | None = None
    mismatch: Sequence[dict[str, Any]] = ()
    self_answers: Sequence[str] | None = None


@dataclass
class Cost:
    """What a piece of work cost. A forward or backward is one network call, whatever its batch."""

    forwards: int = 0
    backwards: int = 0
    decisions: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.decisions + other.decisions,
        )


@dataclass(frozen=True)
class Rollout:
    """What an engine returns: row b of ``trajectories`` is ``samples[b]``, groups contiguous."""

    trajectories: Trajectories
    samples: list[Sample]
    cost: Cost


@dataclass(frozen=True)
class Evaluation:
    """A policy's differentiable view of the decisions it is shown, each ``[B, T]`` float32.

    Attributes:
        log_prob: log-probability of each decision (0 where the mask is off).
        entropy: entropy of the decision's distribution, when asked for.
        divergence: divergence of the decision's distribution from the one in
            ``ref_prediction`` or ``old_prediction``, when asked for.
        prediction: ``[B, T, ...]`` the distribution's parameters, when asked for.
    """

    log_prob: Tensor
    entropy: Tensor | None = None
    divergence: Tensor | None = None
    prediction: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What an evaluation shall contain beside the log-probabilities.

    Attributes:
        entropy: fill ``Evaluation.entropy``.
        divergence: kind of divergence (``exact``, ``code``, ``velocity``, ``mean``) or None.
        divergence_target: ``ref``, ``old`` or ``best``: which stored prediction it is measured
            from.
        prediction: fill ``Evaluation.prediction``.
    """

    entropy: bool = False
    divergence: str | None = None
    divergence_target: str = "ref"
    prediction: bool = False


class Policy(Protocol):
    """A generative model whose decisions can be sampled and evaluated again.

    ``network`` owns every weight the evaluation uses; those that train have
    ``requires_grad``. ``evaluate`` is the only way log-probabilities are computed in training, and
    reads the trajectories' ``payload``, ``mask``, stored predictions, ``target`` and ``sigma``,
    nothing else.
    """

    modality: str
    network: torch.nn.Module
    forwards: int
    """Network calls made so far, for the cost account."""
    reference_weights: Weights
    """The reference's own tensors, for the checkpoint."""
    ratio_tolerance: Mapping[str, float]
    """Dtype -> largest ratio - 1 before an update that rounding explains."""

    def check(self, prompts: Sequence[Prompt], *, room: int) -> None:
        """Raise DataError for a prompt that cannot be used. ``room``: decisions it must leave."""
        ...

    def evaluate(self, trajectories: Trajectories, request: Request = ...) -> Evaluation:
        """Evaluate the sampled decisions under the present weights, differentiably."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within the context, evaluate() answers with the reference's weights."""
        ...

    @property
    def has_reference(self) -> bool:
        """Whether there are weights that :meth:`reference` can switch to."""
        ...

    def export(self, directory: Path) -> None:
        """Write a folder that ``from_pretrained`` (or PEFT, for adapters) loads."""
        ...

    def load_export(self, directory: Path) -> None:
        """Load the weights that :meth:`export` wrote."""
        ...


class Weights(Protocol):
    """A second set of weights beside the network's: a reference or an average."""

    def update(self) -> None:
        """Follow the network; called after each optimiser step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps, by name."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


class RolloutEngine(Protocol):
    """Samples from a policy. Built with its sampling settings; never scores."""

    room: int
    """Decisions that a sample may have and that its prompt must leave in the model's context."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
    ) -> Rollout:
        """Sample ``group_size`` generations per prompt.

        ``version`` counts the updates of the weights; ``iteration`` is the training step, from 0,
        which what changes in the course of training follows.

        Sample g of prompt p depends only on (seed, p.index, g) and the weights, never on which
        other prompts are in the batch. ``trajectories.group`` is ``prompt.index``.
        """
        ...


OnSamples = Callable[[Sequence[Sample]], None]
"""Takes the samples of one whole group. An engine with ``announces = True`` has the keyword
``on_samples`` in ``generate``, and calls it while other groups are not finished yet."""


@dataclass(frozen=True)
class Scores:
    """What a scorer returns.

    Attributes:
        values: name -> ``[B]`` float32 on the CPU; NaN means not applicable, nothing else.
        dropped: ``[B]`` bool; a reward failed on these samples, so they must not be trained on.
        seconds: name -> how long the reward took.
    """

    values: dict[str, Tensor]
    dropped: Tensor
    seconds: dict[str, float]


class Scorer(Protocol):
    """Turns samples into named scores."""

    def score(self, samples: Sequence[Sample], *, step: int) -> Scores:
        """Score all samples with every reward. Raises RewardError."""
        ...

    def ahead(self, prompts: Sequence[Prompt], *, sync: bool = True) -> AheadScorer | None:
        """Return what scores samples of these prompts while others are made, if that is the same.

        For one rollout: it takes in the groups as they are finished, then scores them all. Without
        ``sync`` only async rewards begin early.
        """
        ...


class AheadScorer(Protocol):
    """A scorer of one rollout that begins before all samples are there."""

    def add(self, samples: Sequence[Sample]) -> None:
        """Begin with the samples of one whole group."""
        ...

    def score(self, samples: Sequence[Sample], *, step: int) -> Scores:
        """Score all samples, in the order of the rollout. Raises RewardError."""
        ...


class PromptSource(Protocol):
    """An ordered, resumable stream of prompts."""

    def __len__(self) -> int: ...

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> list[Prompt]:
        """The prompts of a step: a pure function of (step, size, seed), so resuming needs no state.

        ``size`` counts all ranks; each rank gets its contiguous slice of the same global batch.
        """
        ...

    def all(self, limit: int | None = None) -> Iterable[Prompt]:
        """The prompts in the order of the data, the first ``limit`` of them."""
        ...


class Tracker(Protocol):
    """Receives the metrics of a step."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take in the metrics of a step."""
        ...

    def truncate_after(self, step: int) -> None:
        """Forget later steps: a resumed run does them again."""
        ...

    def close(self) -> None:
        """Write out what is left and finish."""
        ...
