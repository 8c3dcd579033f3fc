"""What the terminal shows of a run: a progress bar with the live reward, or a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 10.0
EVALUATED = "eval/success"
SHOWN = (("reward", "reward/mean"), ("success", EVALUATED))
"""Label -> metric; each keeps its last finite value."""


class Console:
    """A progress bar with the live reward, the last success and the time left.

    Where the output is not a terminal it prints a line every ten seconds instead, and one for each
    evaluation and for the last step.

    Args:
        total_steps: steps of the whole run.
        title: stands before the bar.
        file: where to write; standard output by default.
        every_s: seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "train",
        file: TextIO | None = None,
        every_s: float = LINE_EVERY_S,
    ) -> None:
        from rich.console import Console as RichConsole

        self._total = total_steps
        self._title = title
        self._every_s = every_s
        self._output = RichConsole(file=file)
        self._progress: tuple[Progress, TaskID] | None = None
        self._values: dict[str, float] = {}
        self._started: tuple[float, int] | None = None
        self._last_line = -math.inf

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Show a step."""
        now = time.monotonic()
        # The first step this process reports is where the time left is counted from.
        self._started = self._started or (now, step)
        for label, name in SHOWN:
            value = metrics.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                self._values[label] = float(value)
        if self._output.is_terminal:
            self._show_bar(step)
        elif step == self._total or EVALUATED in metrics or self._last_line + self._every_s <= now:
            self._last_line = now
            self._output.print(self._line(step, now), soft_wrap=True, highlight=False)

    def truncate_after(self, step: int) -> None:
        """Nothing: what was shown was shown."""

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._progress is not None:
            self._progress[0].stop()
            self._progress = None

    def _line(self, step: int, now: float) -> str:
        begun, first = self._started or (now, step)
        parts = [f"{self._title} step {step}/{self._total}", *self._shown()]
        if first < step < self._total:
            left = (now - begun) / (step - first) * (self._total - step)
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)

    def _shown(self) -> list[str]:
        return [f"{label} {value:.3f}" for label, value in self._values.items()]

    def _show_bar(self, step: int) -> None:
        if self._progress is None:
            self._progress = self._start_bar(step)
        progress, task = self._progress
        progress.update(task, completed=step, shown="  ".join(self._shown()))

    def _start_bar(self, step: int) -> tuple[Progress, TaskID]:
        from rich import progress as rich

        bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=24),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[shown]}"),
            rich.TimeRemainingColumn(),
            console=self._output,
            speed_estimate_period=120,
        )
        bar.start()
        return bar, bar.add_task(self._title, total=self._total, completed=step, shown="")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
