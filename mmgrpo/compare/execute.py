"""Running a contest: each run is the ordinary ``mmgrpo train``, then measured; finished ones stay.

A run lives in its own process, so several go side by side, and an interrupted contest continues
where it stopped: the runs resume from their checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmgrpo.compare.contest import QUICKSTART, Contest, Entry
from mmgrpo.errors import MmgrpoError

MEASURES = "measures.json"
Progress = Callable[[str], None]


def run_contest(contest: Contest, *, jobs: int = 1, progress: Progress | None = None) -> None:
    """Train and measure every run of the contest that is not done.

    Args:
        contest: checked before anything starts.
        jobs: processes side by side; the cores are shared out among them.
        progress: called with a line for each finished run.

    Raises:
        MmgrpoError: a run failed; the others of the contest are kept.
    """
    contest.check()
    report = progress or (lambda line: None)
    pairs = [(entry, seed) for seed in range(contest.seeds) for entry in contest.entries]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_run, contest, *pair, threads) for pair in pairs]
        failures = []
        for (entry, seed), future in zip(pairs, futures, strict=True):
            error = future.exception()
            if error is not None:
                failures.append(f"{entry.label} (seed {seed}): {error}")
            report(f"{entry.label} seed {seed}: {'failed' if error else 'done'}")
    if failures:
        raise MmgrpoError(f"{len(failures)} of {len(pairs)} runs failed; " + "; ".join(failures))


def _run(contest: Contest, entry: Entry, seed: int, threads: int) -> None:
    run_dir = contest.run_dir(entry, seed)
    if (run_dir / MEASURES).is_file():
        return
    overrides = contest.overrides(entry, seed)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    train = [sys.executable, "-m", "mmgrpo", "train", QUICKSTART + contest.task, *overrides]
    _call(train, environment, run_dir)
    measure = [sys.executable, "-m", "mmgrpo.compare.measure", str(run_dir)]
    _call(measure, environment, run_dir)


def _call(command: list[str], environment: dict[str, str], run_dir: Path) -> None:
    """Run a command with its output in ``<run_dir>.log``; raise its last line if it fails."""
    log = run_dir.with_name(f"{run_dir.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        raise MmgrpoError(f"{lines[-1]} (see {log})")


def write_measures(run_dir: Path, measures: dict[str, Any]) -> None:
    """Mark a run as done, atomically."""
    temporary = run_dir / f".{MEASURES}.partial"
    temporary.write_text(json.dumps(measures, indent=1), encoding="utf-8")
    temporary.replace(run_dir / MEASURES)


def read_measures(run_dir: Path) -> dict[str, Any]:
    """What was measured of a finished run."""
    measures: dict[str, Any] = json.loads((run_dir / MEASURES).read_text(encoding="utf-8"))
    return measures
