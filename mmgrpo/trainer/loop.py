"""The loop around the step: evaluate, log, checkpoint, resume, stop cleanly."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmgrpo.config.schema import Config
from mmgrpo.errors import Interrupted
from mmgrpo.trainer.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from mmgrpo.trainer.evaluate import evaluate
from mmgrpo.trainer.parts import Collected, Parts, State
from mmgrpo.trainer.step import train_step

RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Largest |ratio - 1| before the first update that rounding in a dtype explains."""


def fit(parts: Parts, config: Config) -> dict[str, Any]:
    """Train until ``trainer.steps``, resuming from the newest checkpoint of the run folder.

    Returns:
        The metrics of the last step.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the running step was finished and saved first.
    """
    run_dir = Path(config.run_dir)
    saved = latest_checkpoint(run_dir)
    state, metrics = State(), {}
    if saved is not None:
        state = load_checkpoint(saved, parts, config.model_dump())
        for tracker in parts.trackers:
            tracker.truncate_after(state.step)
    with _stop_requested() as stop:
        if saved is None and parts.evaluator is not None:
            metrics = {"step": 0, **_evaluate(parts, state, config)}
            _log(parts, metrics, 0)
        while state.step < config.trainer.steps:
            metrics, collected = _guarded_step(parts, state, config)
            if state.updates <= config.trainer.minibatches * config.trainer.epochs:
                check_on_policy(metrics, config.model.dtype)
            _after_step(parts, state, config, metrics, collected)
            if stop.is_set() or _due(state.step, config.trainer.save_every, config):
                _save(parts, state, config)
            if stop.is_set():
                raise Interrupted(
                    f"interrupted after step {state.step}; saved in {run_dir}, "
                    "the same command resumes."
                )
    if parts.finish is not None and parts.accelerator.is_main_process:
        parts.finish(run_dir)
    return metrics


def _guarded_step(
    parts: Parts, state: State, config: Config
) -> tuple[dict[str, Any], Collected]:
    """One step; if it fails before the weights moved, everything up to it is saved first."""
    before = replace(state)
    try:
        return train_step(parts, state, config)
    except Exception:
        if before.step and state.updates == before.updates and parts.collective.size == 1:
            _save(parts, before, config)
        raise


def check_on_policy(metrics: dict[str, Any], dtype: str) -> None:
    """Before the first update the ratio must be 1: warn, and say where to look, if it is not."""
    deviation = metrics["ratio/first_max_deviation"]
    if abs(deviation) > RATIO_TOLERANCE[dtype]:
        warnings.warn(
            f"before the first update the ratio deviates from 1 by {deviation:.2g} "
            f"(expected at most {RATIO_TOLERANCE[dtype]:g} in {dtype}): rollout and training do not "
            "compute the same log-probability. Look at temperature and guidance, dropout, "
            "the attention implementation, and the precision of logits or latents.",
            stacklevel=2,
        )


def _after_step(
    parts: Parts, state: State, config: Config, metrics: dict[str, Any], collected: Collected
) -> None:
    evaluating = parts.evaluator is not None and _due(state.step, config.eval.every, config)
    if evaluating:
        metrics.update(_evaluate(parts, state, config))
    every = config.tracking.samples_every or config.eval.every
    if parts.write_samples is not None and (
        state.step == 1 or (every and state.step % every == 0) or state.step == config.trainer.steps
    ):
        _write_samples(parts, state.step, collected)
    _log(parts, {"step": state.step, **metrics}, state.step)


def _due(step: int, every: int | None, config: Config) -> bool:
    return step == config.trainer.steps or bool(every and step % every == 0)


def _save(parts: Parts, state: State, config: Config) -> None:
    save_checkpoint(
        Path(config.run_dir),
        parts,
        state,
        config.model_dump(),
        keep=config.trainer.keep_checkpoints,
    )


def _evaluate(parts: Parts, state: State, config: Config) -> dict[str, float]:
    assert parts.evaluator is not None
    with parts.evaluation_weights:
        metrics, samples, rewards = evaluate(parts.evaluator, parts.collective, step=state.step)
    if parts.write_samples is not None and parts.accelerator.is_main_process:
        parts.write_samples(state.step, samples, rewards, None, "eval")
    return metrics


def _write_samples(parts: Parts, step: int, collected: Collected) -> None:
    if parts.accelerator.is_main_process and parts.write_samples is not None:
        rewards = collected.trajectories.rewards
        parts.write_samples(step, collected.samples, rewards, None, "train")


def _log(parts: Parts, metrics: dict[str, Any], step: int) -> None:
    if parts.accelerator.is_main_process:
        for tracker in parts.trackers:
            tracker.log(metrics, step)


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def synchronise_threads(count: int | None) -> None:
    """Fix the number of CPU threads; sums in float32 depend on it."""
    if count is not None:
        torch.set_num_threads(count)
