"""Call one reward on some samples: sync or async, with a deadline, and distrust what comes back."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mmgrpo.protocols import Sample
from mmgrpo.scoring.load import RESERVED, NamedReward
from mmgrpo.scoring.locate import cause_of

FLOAT32_MAX = 3.4028235e38
GRACE_S = 1.0
"""How long a cancelled async reward may take to give way before its loop is given up."""


@dataclass(frozen=True)
class Outcome:
    """What a call came to.

    Attributes:
        values: one per sample, None where the reward does not apply or failed; None if the call
            as a whole failed.
        failures: index of a sample -> what is wrong with its value.
        error: what is wrong with the call as a whole.
        exception: the cause, if one was raised.
        seconds: wall time.
    """

    values: list[float | None] | None = None
    failures: Mapping[int, str] = field(default_factory=dict)
    error: str | None = None
    exception: BaseException | None = None
    seconds: float = 0.0


def keywords(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return everything a reward may be given, as lists with one entry per sample.

    A column that a row lacks is None; columns named like one of the sample's own arguments are
    left out.
    """
    columns = {n: None for s in samples for n in s.prompt.columns if n not in RESERVED}
    values: dict[str, Any] = {n: [s.prompt.columns.get(n) for s in samples] for n in columns}
    values["prompts"] = [sample.prompt.content for sample in samples]
    for made in ("image", "video"):
        if all(getattr(sample, made) is not None for sample in samples):
            if all(sample.self_answers is not None for sample in samples):
                values["self_answers"] = [sample.self_answers for sample in samples]
            return values | {f"{made}s": [getattr(sample, made) for sample in samples]}
    values["completions"] = [_completion(sample) for sample in samples]
    values["truncated"] = [sample.truncated for sample in samples]
    if any(sample.prompt.images for sample in samples):
        values["images"] = [sample.prompt.images for sample in samples]
    if all(sample.length is not None for sample in samples):
        values["lengths"] = [sample.length for sample in samples]
    return values


def _completion(sample: Sample) -> Any:
    """A chat prompt is answered by a message, as in TRL."""
    if isinstance(sample.prompt.content, str):
        return sample.completion
    return [{"role": "assistant", "content": sample.completion}]


class Caller:
    """Starts calls and collects their outcomes.

    Async rewards run side by side on one event loop in a background thread, which lives as long as
    this object, so that their clients survive from step to step. Sync rewards run in the calling
    thread; with a time limit, in a daemon thread (one that exceeds it cannot be stopped, only left
    behind), except those that keep time themselves.

    Args:
        timeout_s: limit of one call in seconds; None for no limit.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def start(self, reward: NamedReward, samples: Sequence[Sample]) -> Callable[[], Outcome]:
        """Return a function that waits for the outcome; an async reward starts right away."""
        arguments = {k: v for k, v in keywords(samples).items() if reward.takes(k)}
        if is_async(reward):
            begun = time.perf_counter()
            future = self._schedule(_invoke(reward.fn, arguments))
            ended: list[float] = []
            future.add_done_callback(lambda _: ended.append(time.perf_counter()))
            return lambda: self._outcome(lambda: self._wait(future), len(samples), begun, ended)

        def call() -> Any:
            result = reward.fn(**arguments)
            return self._wait(self._schedule(result)) if inspect.isawaitable(result) else result

        if self.timeout_s is None or reward.keeps_time:
            return lambda: self._outcome(call, len(samples))
        limit = self.timeout_s
        return lambda: self._outcome(lambda: _in_thread(call).result(limit), len(samples))

    def close(self) -> None:
        """Stop the event loop."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _outcome(
        self,
        wait: Callable[[], Any],
        size: int,
        begun: float | None = None,
        ended: Sequence[float] = (),
    ) -> Outcome:
        begun = time.perf_counter() if begun is None else begun
        try:
            values, failures, error = check_values(wait(), size)
            problem = None
        except Exception as raised:  # noqa: BLE001 - whatever the user's function raises
            values, failures, error, problem = None, {}, cause_of(raised), raised
        seconds = (ended[0] if ended else time.perf_counter()) - begun
        if isinstance(problem, TimeoutError) and self.timeout_s and seconds > 0.99 * self.timeout_s:
            error = f"it took longer than {self.timeout_s:g} s"
        return Outcome(values, failures, error, problem, seconds)

    def _schedule(self, work: Awaitable[Any]) -> Future[Any]:
        with self._starting:
            loop = self._loop
            if loop is None:
                loop = self._loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(_limited(work, self.timeout_s), loop)

    def _wait(self, future: Future[Any]) -> Any:
        if self.timeout_s is None:
            return future.result()
        try:
            return future.result(self.timeout_s + GRACE_S)
        except TimeoutError:
            if not future.done():
                self._loop = None  # something blocks it; the next async call gets a fresh one
            raise


def is_async(reward: NamedReward) -> bool:
    """Whether the reward is an ``async def`` function, or an object whose call is one."""
    return any(map(inspect.iscoroutinefunction, (reward.fn, type(reward.fn).__call__)))


async def _invoke(fn: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return await fn(**arguments)


async def _limited(work: Awaitable[Any], timeout_s: float | None) -> Any:
    return await asyncio.wait_for(work, timeout_s)


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - handed on to the caller
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def check_values(
    result: Any, size: int
) -> tuple[list[float | None] | None, dict[int, str], str | None]:
    """Check what a reward returned: one finite number or None per sample.

    Returns:
        The values (None if they cannot be matched with samples), what is wrong with single ones,
        and what is wrong with the whole.
    """
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return None, {}, f"it returned {type(result).__name__} instead of a list"
    if len(result) != size:
        return None, {}, f"it returned {len(result)} values for {size} samples"
    values: list[float | None] = []
    failures: dict[int, str] = {}
    for index, value in enumerate(result):
        number = _number(value)
        if value is not None and number is None:
            failures[index] = f"it returned {value!r} instead of a finite number or None"
        values.append(number)
    return values, failures, None


def _number(value: Any) -> float | None:
    """The value as a finite float, None if it is none."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) <= FLOAT32_MAX else None
