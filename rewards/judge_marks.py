"""Ask a judge for a mark: what rewards on pictures and on videos have in common."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from PIL import Image

from mmgrpo.errors import ConfigError

from .judge_endpoint import JudgeEndpoint, JudgeFailure, read_object
from .text import text_of


class JudgeMarks:
    """Shows a model pictures with a question, and reads the mark it answers with.

    Args:
        reward: name of the reward, for errors.
        endpoint: the judge.
        question: what it is asked; ``{prompt}`` is replaced.
        scale: the worst and the best mark.

    Raises:
        ConfigError: a bad scale or question.
    """

    def __init__(
        self, reward: str, endpoint: JudgeEndpoint, question: str, scale: tuple[float, float]
    ) -> None:
        self.worst, self.best = (float(mark) for mark in scale)
        if not self.worst < self.best:
            raise ConfigError(f"{reward}: scale must go from low to high; got {list(scale)}.")
        if "{prompt}" not in question:
            raise ConfigError(f"{reward}: the question must contain {{prompt}}.")
        self.endpoint, self.question = endpoint, question

    async def __call__(
        self, shown: Sequence[Sequence[Image.Image]], prompts: Sequence[Any]
    ) -> list[float]:
        """Return the mark of each entry of ``shown``, brought to [0, 1].

        Raises:
            JudgeFailure: no usable answer, after all repetitions.
        """
        marks = [
            self._mark(pictures, self.question.replace("{prompt}", text_of(prompt)))
            for pictures, prompt in zip(shown, prompts, strict=True)
        ]
        return list(await asyncio.gather(*marks))

    async def _mark(self, pictures: Sequence[Image.Image], question: str) -> float:
        answer = ""
        for _ in range(self.endpoint.retries + 1):
            answer = await self.endpoint.ask(question, pictures)
            mark = (read_object(answer) or {}).get("score")
            if _is_number(mark) and self.worst <= mark <= self.best:
                return (mark - self.worst) / (self.best - self.worst)
        raise JudgeFailure(
            f'expected {{"score": N}} with N from {self.worst:g} to {self.best:g}; '
            f"the judge answered {answer[:200]!r}"
        )


def _is_number(mark: Any) -> TypeGuard[float]:
    return isinstance(mark, int | float) and not isinstance(mark, bool) and math.isfinite(mark)
