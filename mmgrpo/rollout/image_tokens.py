"""The engine for autoregressive image generators: tokens as usual, then pictures.

Shapes: R rows of T tokens, of which r are being written, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import DataError
from mmgrpo.protocols import Cost, OnSamples, Prompt, Rollout, Sample
from mmgrpo.rollout.autoregressive import AutoregressiveEngine, TokenPolicy

QUESTIONS = "questions"
"""Column with a row's questions: pairs of a question and its answer."""
TEXT, IMAGE, DONE = 0, 1, 3
"""Kinds of places: decisions in the plan and in the picture; after the last code."""


class Answerer(TokenPolicy, Protocol):
    """What answers questions about pictures."""

    def ask(
        self, ids: Tensor, questions: Sequence[Sequence[str]], names: Sequence[tuple[int, ...]]
    ) -> list[Any]:
        """Return the questions about the pictures in ``ids [B, T]`` as prompts, in order."""
        ...

    def bind(
        self,
        drawn: Trajectories,
        answered: Trajectories,
        counts: Sequence[int],
        *,
        width: int,
        room: int,
    ) -> Trajectories:
        """Let the answers, ``counts [B]`` of each picture, be decisions of the pictures' rows."""
        ...


class DrawingPolicy(TokenPolicy, Protocol):
    """What the engine needs of a policy whose samples are pictures."""

    layout: Any

    def kinds(self, ids: Tensor, place: Tensor) -> Tensor:
        """Return what places in samples are for."""
        ...

    def kind_distribution(self, logits: Tensor, temperature: float, kinds: Tensor) -> Tensor:
        """Return ``[r, V]`` log-probabilities of tokens of the kinds ``[r]``."""
        ...

    def draw(self, ids: Tensor) -> list[Image]:
        """Return the pictures in complete samples."""
        ...

    def plans(self, ids: Tensor) -> list[str | None]:
        """Return the plans in samples."""
        ...

    def answering(self) -> Answerer:
        """Return the same model as one that answers questions."""
        ...


class ImageTokenEngine(AutoregressiveEngine):
    """Samples plans and pictures; a place that allows one token only is no decision.

    ``segment`` is 0 in the plan and 1 in the picture. Where it is told to, it lets the model answer
    the questions of the prompt about the picture that it drew, by the same weights: greedily, or as
    decisions (of segment 2) that are drawn like the others and have the picture's advantage.
    """

    policy: DrawingPolicy

    def __init__(
        self,
        policy: DrawingPolicy,
        *,
        ask_questions: bool = False,
        train_answers: bool = False,
        max_answer_tokens: int = 16,
        **sampling: Any,
    ) -> None:
        """Choose how to sample.

        Args:
            policy: what to sample from.
            ask_questions: fill ``Sample.self_answers``.
            train_answers: the answers are decisions too.
            max_answer_tokens: a longer answer is cut.
            **sampling: see :class:`AutoregressiveEngine`.

        Raises:
            ConfigError: a number out of its range.
        """
        super().__init__(policy, max_new_tokens=policy.layout.room, **sampling)
        self._answerer = policy.answering() if ask_questions or train_answers else None
        # With questions, a group is complete when they are answered, after all pictures.
        self.announces = self._answerer is None
        self._train_answers = train_answers
        self._answer_room = max_answer_tokens

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
        on_samples: OnSamples | None = None,
    ) -> Rollout:
        """Draw ``group_size`` pictures per prompt, and let the model answer about them.

        ``on_samples`` gets each group when its last picture is complete, where nothing is asked.

        Raises:
            DataError: a prompt that cannot be used, or has no questions where they are asked.
        """
        options = {"group_size": group_size, "seed": seed, "version": version}
        told = on_samples if self.announces else None
        rollout = super().generate(prompts, **options, iteration=iteration, on_samples=told)
        if self._answerer is None:
            return rollout
        names = [(prompt.index, member) for prompt in prompts for member in range(group_size)]
        return self._answered(self._answerer, rollout, names, seed)

    def _answered(
        self, answerer: Answerer, rollout: Rollout, names: list[tuple[int, int]], seed: int
    ) -> Rollout:
        """Ask about every picture; where answers train, they become decisions of its row."""
        drawn, trained = rollout.trajectories, self._train_answers
        questions = [_questions(sample.prompt) for sample in rollout.samples]
        temperature = self._temperature if trained else 0.0
        engine = AutoregressiveEngine(
            answerer, max_new_tokens=self._answer_room, temperature=temperature
        )
        asked = answerer.ask(drawn.payload.completion_ids, questions, names)
        answers = engine.generate(asked, group_size=1, seed=seed)
        texts = iter([sample.completion or "" for sample in answers.samples])
        samples = [
            replace(sample, self_answers=tuple(next(texts) for _ in several))
            for sample, several in zip(rollout.samples, questions, strict=True)
        ]
        if not trained:
            return Rollout(drawn, samples, rollout.cost + Cost(forwards=answers.cost.forwards))
        counts, room = [len(several) for several in questions], self._answer_room
        whole = answerer.bind(drawn, answers.trajectories, counts, width=self.room, room=room)
        return Rollout(whole, samples, rollout.cost + answers.cost)

    def _distribution(self, logits: Tensor, ids: Tensor, rows: Tensor, count: Tensor) -> Tensor:
        kinds = self.policy.kinds(ids[rows], count[:, None]).squeeze(1)
        return self.policy.kind_distribution(logits, self._temperature or 1.0, kinds)

    def _has_stop(self, ids: Tensor, rows: Tensor, count: Tensor) -> Tensor:
        """Return ``[r]``: the picture is complete."""
        return self.policy.kinds(ids[rows], count[:, None]).squeeze(1) == DONE

    def _assemble(self, *arguments: Any) -> Trajectories:
        trajectories = super()._assemble(*arguments)
        ids, mask = trajectories.payload.completion_ids, trajectories.mask
        place = torch.arange(mask.shape[1], device=mask.device)
        kinds = self.policy.kinds(ids, place)
        decides = (kinds == TEXT) | (kinds == IMAGE)
        return trajectories.replace(mask=mask & decides, segment=kinds.clamp(max=IMAGE))

    def _samples(self, trajectories: Trajectories, prompts: Sequence[Prompt]) -> list[Sample]:
        ids, lengths = trajectories.payload.completion_ids, trajectories.lengths.tolist()
        owners = [prompt for prompt in prompts for _ in range(len(ids) // len(prompts))]
        columns = (owners, self.policy.plans(ids), self.policy.draw(ids), lengths)
        return [
            Sample(prompt, completion=plan, image=image, length=n, self_answers=())
            for prompt, plan, image, n in zip(*columns, strict=True)
        ]


def _questions(prompt: Prompt) -> list[str]:
    """The questions of a row.

    Raises:
        DataError: the row has none, or something else in their place.
    """
    pairs = prompt.columns.get(QUESTIONS)
    try:
        questions = [str(question) for question, _ in pairs or ()]
    except (TypeError, ValueError):
        questions = []
    if not questions:
        raise DataError(
            f"{prompt.place}: rollout.ask_questions needs the column '{QUESTIONS}', a list of "
            f"[question, answer] pairs; got {pairs!r}."
        )
    return questions
