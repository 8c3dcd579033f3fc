"""What every image and video reward must satisfy, on whatever small model its test builds."""

from __future__ import annotations

import asyncio
import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from mmgrpo.protocols import Prompt, Sample
from mmgrpo.scoring.load import NamedReward
from mmgrpo.scoring.runner import RewardRunner


@dataclass(frozen=True)
class Case:
    """Samples on which a reward is held to its contract.

    Attributes:
        reward: called with keyword lists; may be async.
        images: at least four pictures, or videos, that do not all deserve the same score.
        columns: ``prompts`` and the data's columns, one entry per picture.
        low, high: the documented range.
        better, worse: numbers of two of the pictures; the first deserves more.
        tolerance: how far the score may move with the rest of the batch.
        grouped: scores depend on the other pictures of the same prompt.
        made: ``images`` or ``videos``: the argument under which they are given.
    """

    reward: Callable[..., Any]
    images: Sequence[Any]
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    low: float = -math.inf
    high: float = math.inf
    better: int = 0
    worse: int = 1
    tolerance: float = 1e-5
    grouped: bool = False
    made: str = "images"

    def score(self, rows: Sequence[int] | None = None) -> list[float | None]:
        """The scores of the given rows, in one call, with arguments in an arbitrary order."""
        rows = range(len(self.images)) if rows is None else rows
        arguments = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        arguments[self.made] = [self.images[row] for row in rows]
        result = self.reward(**arguments)
        return asyncio.run(_wait(result)) if inspect.isawaitable(result) else result


async def _wait(result: Any) -> Any:
    return await result


def check_contract(case: Case) -> None:
    """Hold a reward to all of it."""
    whole = case.score()
    for check in (in_range, deterministic, batch_invariant, order_free, monotone, alive, runs):
        check(case, whole)


def in_range(case, whole):
    assert len(whole) == len(case.images)
    assert all(value is None or type(value) is float for value in whole)
    scored = [value for value in whole if value is not None]
    assert scored
    assert all(math.isfinite(value) and case.low <= value <= case.high for value in scored)


def deterministic(case, whole):
    state = random.getstate()
    random.seed(7)
    assert case.score() == whole
    random.setstate(state)


def batch_invariant(case, whole):
    """Alone, in part and in another order, a picture has the score it has in the whole batch."""
    rows = list(range(len(whole)))
    if not case.grouped:
        alone = [case.score([row])[0] for row in rows]
        assert alone == pytest.approx(whole, abs=case.tolerance)
        assert case.score(rows[1:]) == pytest.approx(whole[1:], abs=case.tolerance)
    backwards = case.score(rows[::-1])[::-1]
    assert backwards == pytest.approx(whole, abs=case.tolerance)


def order_free(case, whole):
    """Arguments travel by name, extra columns are ignored, and nothing is taken by position."""
    extra = Case(
        case.reward,
        case.images,
        {"unrelated": list(range(len(whole))), **dict(reversed(case.columns.items()))},
        made=case.made,
    )
    assert extra.score() == pytest.approx(whole, abs=case.tolerance)
    signature = inspect.signature(case.reward)
    assert any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    assert signature.parameters[case.made].default is inspect.Parameter.empty
    if "prompts" in signature.parameters:
        swapped = {**case.columns, "prompts": list(case.images)}
        with pytest.raises(Exception):  # noqa: B017, PT011 - which one is the reward's business
            Case(case.reward, list(case.columns["prompts"]), swapped, made=case.made).score()


def monotone(case, whole):
    assert whole[case.better] > whole[case.worse]


def alive(case, whole):
    """A reward that gives everything the same score measures nothing: the usual broken set-up."""
    scored = [value for value in whole if value is not None]
    assert max(scored) - min(scored) > 10 * case.tolerance


def runs(case, whole):
    """The run's own scorer calls it with samples, and finds nothing to complain about."""
    prompts = case.columns.get("prompts", ["a prompt"] * len(whole))
    columns = [
        {name: column[row] for name, column in case.columns.items() if name != "prompts"}
        for row in range(len(whole))
    ]
    samples = [
        Sample(
            Prompt(row, prompts[row], columns=columns[row]),
            **{case.made.removesuffix("s"): case.images[row]},
        )
        for row in range(len(whole))
    ]
    runner = RewardRunner([NamedReward("reward", 1.0, case.reward, frozenset())])
    try:
        scores = runner.score(samples, step=0)
    finally:
        runner.close()
    expected = [math.nan if value is None else value for value in whole]
    assert scores.values["reward"].tolist() == pytest.approx(
        expected, abs=case.tolerance, rel=1e-5, nan_ok=True
    )
    assert not scores.dropped.any()
