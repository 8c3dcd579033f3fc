"""The loop around the step: evaluate, log, checkpoint, resume, stop cleanly."""

from __future__ import annotations

import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmgrpo.config.schema import Config
from mmgrpo.core.seeding import mix_seed
from mmgrpo.errors import Interrupted, RewardError
from mmgrpo.trainer.checkpoint import load_checkpoint, save_checkpoint
from mmgrpo.trainer.distributed import any_rank
from mmgrpo.trainer.evaluate import evaluate
from mmgrpo.trainer.parts import Collected, Parts, State
from mmgrpo.trainer.randomness import random_state, seed_everything, set_random_state
from mmgrpo.trainer.run_folder import checkpoints
from mmgrpo.trainer.step import train_step

logger = logging.getLogger(__name__)

RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Largest ratio - 1 before an update that rounding in a dtype explains, for whole log-densities."""


def fit(parts: Parts, config: Config) -> dict[str, Any]:
    """Train until the budget is used, resuming from the newest checkpoint of the run folder.

    Returns:
        The metrics of the last step.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the running step was finished and saved first.
    """
    state = _resume(parts, config)
    first = state.step + 1
    with _stop_requests() as requested:
        if state.step == 0 and parts.evaluator is not None:
            _log(parts, {"step": 0, **_evaluate(parts, state)}, 0)
        while not finished(parts, state, config):
            if any_rank(parts.collective, requested()):
                raise _interrupt(parts, state, config)
            collected = _step(parts, state, config)
            if state.step == first and (first == 1 or not parts.old_samples):
                check_on_policy(state.metrics, config.model.dtype, parts.policy.ratio_tolerance)
            last = finished(parts, state, config)
            if parts.evaluator is not None and (last or _due(state, config.eval.every)):
                state.metrics.update(_evaluate(parts, state))
            if state.step == 1 or last or _due(state, config.eval.every):
                _write_samples(parts, state, collected)
            _log(parts, state.metrics, state.step)
            if last or _due(state, config.trainer.save_every):
                _save(parts, state, config)
    if parts.finish is not None:
        parts.finish(Path(config.run_dir))
    return state.metrics


def _resume(parts: Parts, config: Config) -> State:
    """Return to the newest checkpoint, or to the beginning."""
    seed_everything(mix_seed(config.seed, parts.collective.rank))
    saved = checkpoints(Path(config.run_dir))
    state = load_checkpoint(saved[-1], parts) if saved else State()
    for tracker in parts.trackers:
        tracker.truncate_after(state.step if saved else -1)
    return state


def _step(parts: Parts, state: State, config: Config) -> Collected:
    """One step; if it fails before the weights moved, everything up to it is saved first."""
    before, generators = replace(state), random_state()
    try:
        return train_step(parts, state, config)
    except Exception as error:
        everywhere = parts.collective.size == 1 or isinstance(error, RewardError)
        if before.step and state.updates == before.updates and everywhere:
            set_random_state(generators)
            _save(parts, before, config)
        raise


def check_on_policy(
    metrics: dict[str, Any], dtype: str, tolerance: Mapping[str, float] = RATIO_TOLERANCE
) -> None:
    """Before an update the ratio must be 1: warn, and say where to look, if it is not."""
    deviation = metrics["ratio/first_max_deviation"]
    if deviation > tolerance[dtype]:
        warnings.warn(
            f"before the first update the ratio deviates from 1 by {deviation:.2g} (expected at "
            f"most {tolerance[dtype]:g} in {dtype}): rollout and training do not compute the "
            "same log-probability. Look at temperature and guidance, dropout, the attention "
            "implementation, and the precision of logits or latents.",
            stacklevel=2,
        )


def finished(parts: Parts, state: State, config: Config) -> bool:
    """Whether the budget (steps, generated decisions or seconds) is used; equal on every rank."""
    settings = config.trainer
    enough = state.seconds >= (settings.max_seconds or math.inf)
    return (
        state.step >= settings.steps
        or state.decisions >= (settings.max_decisions or math.inf)
        or (settings.max_seconds is not None and any_rank(parts.collective, enough))
    )


def _due(state: State, every: int | None) -> bool:
    return bool(every and state.step % every == 0)


def _save(parts: Parts, state: State, config: Config) -> None:
    keep = config.trainer.keep_checkpoints
    save_checkpoint(Path(config.run_dir), parts, state, config.model_dump(), keep=keep)


def _interrupt(parts: Parts, state: State, config: Config) -> Interrupted:
    if state.step == 0:
        return Interrupted("interrupted before the first step; there was nothing to save.")
    _save(parts, state, config)
    return Interrupted(
        f"interrupted after step {state.step}; saved in {config.run_dir}, "
        "the same command continues."
    )


def _evaluate(parts: Parts, state: State) -> dict[str, float]:
    assert parts.evaluator is not None
    with parts.evaluation_weights:
        metrics, samples, rewards = evaluate(parts.evaluator, parts.collective, step=state.step)
    if parts.write_samples is not None:
        parts.write_samples(state.step, samples, rewards, kind="eval")
    return metrics


def _write_samples(parts: Parts, state: State, collected: Collected) -> None:
    if parts.write_samples is not None:
        rewards, advantage = collected.trajectories.rewards, collected.trajectories.advantage
        parts.write_samples(state.step, collected.samples, rewards, advantage)


def _log(parts: Parts, metrics: dict[str, Any], step: int) -> None:
    for tracker in parts.trackers:
        tracker.log(metrics, step)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C (or SIGTERM) came; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        del frame
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        logger.warning("finishing the step and saving; press Ctrl-C again to stop at once.")

    for number in previous:
        signal.signal(number, request)
    try:
        yield stop.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
