"""A vision-language model compares the pictures of a prompt with each other, two at a time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mmgrpo.errors import ConfigError

from .judge_endpoint import JudgeEndpoint, JudgeFailure, read_object
from .text import text_of

logger = logging.getLogger(__name__)

QUESTION = """\
Two pictures were generated for the prompt: {prompt}

Which one shows better what the prompt asks for, and is better made?
Answer with JSON only: {"better": 1}, {"better": 2}, or {"better": 0} if neither is."""

QUESTION_BY_DIMENSION = """\
Two pictures were generated for the prompt: {prompt}

Which one is better overall ("better"), and which in each of these respects: {dimensions}?
Answer with a JSON object of these keys only, such as {"better": 1}: the number of the better \
picture, 1 or 2, or 0 if neither is."""

OVERALL = "better"
"""Key of the verdict on the whole picture."""
WIN: Mapping[Any, float] = {1: 1.0, 2: 0.0, 0: 0.5}
"""The verdict -> what the first picture gets; the second gets the rest."""


class ImageWinRate:
    """Score pictures by how often a model prefers them to the others of their prompt.

    The pictures of a call that have the same prompt are a group; every two of them are shown to the
    model, in both orders so that a preference for a position cancels. With w the mean of the two
    verdicts, 1 for a preference and 0.5 for a tie or an answer that cannot be read (Pref-GRPO,
    arXiv 2508.20751; its rounding to three digits is left out)::

        R_i = sum over the others j of w(i, j) / (G - 1)

    With ``dimensions``, of weights v_k, the model is asked about each beside the whole picture, and
    a verdict is ``(1 - share) overall + share sum v_k dimension_k / sum v_k`` (the program's
    Flex judge: 0.3 and 0.7, equal weights).

    Range [0, 1], higher is better; the mean over a group is always 0.5, so this shows no progress
    of the whole: log a pointwise reward beside it with weight 0. A picture without others scores
    0.5, after one request with itself. An endpoint that fails, or no answer of which can be read,
    raises; if it fails for some groups
    only, their pictures score NaN, which the run treats as failed, and the log says why. Costs
    G (G - 1) requests per group, half of it without ``swap``.

    Args:
        url: the endpoint, such as ``http://localhost:8000/v1``.
        model: the name under which it serves the model.
        question: what it is asked; ``{prompt}`` and ``{dimensions}`` are replaced. None: a
            question that fits.
        dimensions: key of the answer -> weight, v_k; none: the whole picture alone.
        share: weight of the dimensions together, in [0, 1].
        swap: show each pair in both orders.
        api_key_env: name of the environment variable with the key, if one is needed.
        timeout_s: limit of one request, in seconds.
        retries: how often a request is repeated.
        wait_s: pause before the first repetition; it doubles each time.
        concurrency: requests under way at the same time.
        check: ask at the start whether the endpoint is there and serves the model.

    Raises:
        ConfigError: no endpoint, an unknown model, a missing key, or a bad question, dimension or
            share.
    """

    def __init__(  # noqa: PLR0913 - each names one choice
        self,
        url: str,
        model: str,
        *,
        question: str | None = None,
        dimensions: Mapping[str, float] | None = None,
        share: float = 0.7,
        swap: bool = True,
        api_key_env: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        wait_s: float = 0.5,
        concurrency: int = 16,
        check: bool = True,
    ) -> None:
        self.weights = _weights(dimensions or {}, share)
        question = question or (QUESTION_BY_DIMENSION if dimensions else QUESTION)
        if "{prompt}" not in question:
            raise ConfigError("image_win_rate: the question must contain {prompt}.")
        self.question = question.replace("{dimensions}", ", ".join(dimensions or {}))
        self.swap = swap
        self.endpoint = JudgeEndpoint(
            "image_win_rate", url, model, api_key_env=api_key_env, timeout_s=timeout_s,
            retries=retries, wait_s=wait_s, concurrency=concurrency, max_tokens=512, check=check,
        )  # fmt: skip

    async def __call__(
        self, images: list[Image.Image], prompts: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        groups: dict[str, list[int]] = {}
        for number, (_, prompt) in enumerate(zip(images, prompts, strict=True)):
            groups.setdefault(text_of(prompt), []).append(number)
        outcomes = await asyncio.gather(
            *(self._rates([images[n] for n in rows], text) for text, rows in groups.items()),
            return_exceptions=True,
        )
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failed:
            if not isinstance(failure, JudgeFailure) or len(failed) == len(outcomes):
                raise failure
            logger.warning("image_win_rate: a group of pictures has no score: %s", failure)
        rated = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        if images and not any(readable for _, readable in rated):
            raise JudgeFailure(
                "none of the judge's answers could be read; expected "
                '{"better": 1}, {"better": 2} or {"better": 0}'
            )
        scores = [math.nan] * len(images)
        for rows, outcome in zip(groups.values(), outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                for row, rate in zip(rows, outcome[0], strict=True):
                    scores[row] = rate
        return list(scores)

    async def _rates(self, images: Sequence[Image.Image], prompt: str) -> tuple[list[float], int]:
        """The win rates of one group, and how many of the answers could be read."""
        size = len(images)
        pairs = list(itertools.combinations(range(size), 2))
        orders = [*pairs, *((j, i) for i, j in pairs)] if self.swap else pairs
        verdicts = await asyncio.gather(
            *(self._first_wins(prompt, images[i], images[j]) for i, j in orders or [(0, 0)])
        )
        readable = sum(verdict is not None for verdict in verdicts)
        if size == 1:
            return [0.5], readable
        wins = [0.0] * size
        for (i, j), verdict in zip(orders, verdicts, strict=True):
            win = 0.5 if verdict is None else verdict
            wins[i] += win
            wins[j] += 1.0 - win
        return [won / (size - 1) / (1 + self.swap) for won in wins], readable

    async def _first_wins(
        self, prompt: str, first: Image.Image, second: Image.Image
    ) -> float | None:
        """What the first of two pictures gets; None for an answer that cannot be read."""
        question = self.question.replace("{prompt}", prompt)
        answer = read_object(await self.endpoint.ask(question, [first, second])) or {}
        wins = [_win(answer.get(key)) for key in self.weights]
        if all(win is None for win in wins):
            return None
        pairs = zip(self.weights.values(), wins, strict=True)
        return sum(weight * (0.5 if win is None else win) for weight, win in pairs)


def _win(verdict: Any) -> float | None:
    return WIN.get(verdict) if type(verdict) is int else None


def _weights(dimensions: Mapping[str, float], share: float) -> dict[str, float]:
    """Key of an answer -> weight of its verdict; they sum to 1.

    Raises:
        ConfigError: a number out of its range, or a dimension with the name of the whole.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"image_win_rate: share must be in [0, 1]; got {share}.")
    if OVERALL in dimensions or any(weight <= 0 for weight in dimensions.values()):
        raise ConfigError(
            f"image_win_rate: dimensions need positive weights and names other than '{OVERALL}'; "
            f"got {dict(dimensions)}."
        )
    if not dimensions:
        return {OVERALL: 1.0}
    total = sum(dimensions.values())
    return {OVERALL: 1 - share} | {k: share * v / total for k, v in dimensions.items()}
