"""The generator judges itself: what it answers about its own picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def self_answer(
    self_answers: list[Sequence[str]],
    questions: list[list[Sequence[str]] | None],
    *,
    case_sensitive: bool = False,
    **_columns: Any,
) -> list[float | None]:
    """Score the share of questions that the generator answers rightly about its own picture.

    UniRL (arXiv:2505.23380). The run's engine asks (``rollout.ask_questions: true``); this function
    compares. The column ``questions`` is a list of [question, answer] pairs.

    Range [0, 1], higher is better. An answer is right if it equals the reference apart from the
    space around it; anything else is wrong. A row whose ``questions`` is null scores None. A run
    that does not ask raises ValueError. A model that misreads pictures rewards wrong ones: judge
    the run by something else.

    Args:
        self_answers: the model's answers, in the order of the questions.
        questions: pairs of a question and its reference answer.
        case_sensitive: whether the case of letters counts.
    """
    return [
        None if pairs is None else _share(answers, pairs, case_sensitive)
        for answers, pairs in zip(self_answers, questions, strict=True)
    ]


def _share(answers: Sequence[str], pairs: list[Sequence[str]], case_sensitive: bool) -> float:
    if not answers:
        raise ValueError("the model was not asked; set rollout.ask_questions=true")
    right = [
        _plain(answer, case_sensitive) == _plain(str(pair[1]), case_sensitive)
        for answer, pair in zip(answers, pairs, strict=True)
    ]
    return sum(right) / len(right)


def _plain(text: str, case_sensitive: bool) -> str:
    return text.strip() if case_sensitive else text.strip().casefold()
