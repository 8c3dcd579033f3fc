"""Who competes, over which seeds, with which budget. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmgrpo.compare.settings import AS_PUBLISHED, Settings, read_settings
from mmgrpo.config import Config, load_config
from mmgrpo.config.modalities import MODALITIES
from mmgrpo.config.paths import config_name, packaged_configs
from mmgrpo.errors import ConfigError, nearest

QUICKSTART = "quickstart/"
UNBOUNDED = 1_000_000
"""Steps of a run that another budget ends."""


@dataclass(frozen=True)
class Budget:
    """What every run may use; without a limit, what the task's configuration says.

    Attributes:
        steps: training steps.
        decisions: generated decisions.
        seconds: of training.
    """

    steps: int | None = None
    decisions: int | None = None
    seconds: float | None = None

    def overrides(self) -> list[str]:
        """The limits as settings of a run.

        Raises:
            ConfigError: more than one limit.
        """
        limits = {
            "steps": self.steps,
            "max_decisions": self.decisions,
            "max_seconds": self.seconds,
        }
        given = {key: value for key, value in limits.items() if value is not None}
        if len(given) > 1:
            raise ConfigError(
                "a budget is a number of steps, of decisions or of seconds; "
                f"got {len(given)} of them, expected one."
            )
        return [
            f"trainer.{key}={value}"
            for key, value in ({"steps": UNBOUNDED} | given).items()
            if given
        ]

    @property
    def axis(self) -> str | None:
        """The metric whose running sum the curves are drawn over; None: the step."""
        if self.decisions is not None:
            return "count/generated_decisions"
        return "time/step_s" if self.seconds is not None else None

    def __str__(self) -> str:
        if self.decisions is not None:
            return f"{self.decisions:,} generated decisions"
        if self.seconds is not None:
            return f"{self.seconds:g} seconds of training"
        return "the quickstart's steps" if self.steps is None else f"{self.steps} steps"


@dataclass(frozen=True)
class Entry:
    """One competitor: a preset and what is changed in it.

    Attributes:
        method: preset id.
        overrides: ``key=value`` changes of the run, method slots under ``method.``.
        settings: changes that the preset needs at the task's scale; ``overrides`` come after.
    """

    method: str
    overrides: tuple[str, ...] = ()
    settings: Settings = AS_PUBLISHED

    @property
    def label(self) -> str:
        """How the tables name it: the preset and its changes."""
        return " ".join((self.method, *(item.removeprefix("method.") for item in self.overrides)))

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.label)


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Attributes:
        task: a configuration of ``quickstart/``.
        entries: the competitors.
        seeds: number of seeds, from 0.
        budget: what every run may use.
        out: folder of all runs and of the report.
        changes: ``key=value`` settings that every run shares.
    """

    task: str
    entries: tuple[Entry, ...]
    seeds: int
    budget: Budget
    out: Path
    changes: tuple[str, ...] = ()

    @property
    def conditions(self) -> str:
        """The budget and the shared changes in words."""
        return ", ".join((str(self.budget), *self.changes))

    def run_dir(self, entry: Entry, seed: int) -> Path:
        """Folder of one run."""
        return self.out / entry.folder / f"seed{seed}"

    def overrides(self, entry: Entry, seed: int) -> list[str]:
        """Everything that a run changes in the task's quickstart configuration."""
        return [
            f"method={entry.method}",
            *entry.settings.changes,
            *self.budget.overrides(),
            *self.changes,
            *entry.overrides,
            f"seed={seed}",
            f"run_dir={self.run_dir(entry, seed)}",
        ]

    def config(self, entry: Entry, seed: int) -> Config:
        """The checked configuration of one run."""
        return load_config(QUICKSTART + self.task, self.overrides(entry, seed))

    def check(self) -> None:
        """Refuse the contest if one of its runs is wrong, before the first one starts.

        Raises:
            ConfigError: nothing to compare, the same entry twice, or a wrong configuration.
        """
        if not self.entries:
            raise ConfigError("nothing to compare: name at least one method, or use --all.")
        labels = [entry.label for entry in self.entries]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"'{label}' is named twice; each competitor runs once.")
        for entry in self.entries:
            self.config(entry, 0)


def tasks() -> list[str]:
    """The playground tasks: the configurations of ``quickstart/``."""
    named = (config_name(file) for file in packaged_configs())
    return sorted(name.removeprefix(QUICKSTART) for name in named if name.startswith(QUICKSTART))


def task_modality(task: str) -> str:
    """The modality of a task's model.

    Raises:
        ConfigError: no such task.
    """
    known = tasks()
    if task not in known:
        raise ConfigError(f"unknown task '{task}'{nearest(task, known)}")
    return load_config(QUICKSTART + task).modality


def parse_entry(text: str, task: str, *, published: bool = False) -> Entry:
    """Read ``"flow-grpo advantage.scale=group trainer.learning_rate=1e-4"``.

    A change whose first key is no section of a configuration belongs to the method.

    Args:
        text: method id and changes.
        task: playground task.
        published: leave out what the preset needs at the task's scale.

    Raises:
        ConfigError: no such task, or an empty entry.
    """
    modality = task_modality(task)
    if not text.strip():
        raise ConfigError("a competitor is a method id and its changes; got an empty text.")
    method, *changes = text.split()
    known = {} if published else read_settings(task)
    placed = tuple(_place(change, modality) for change in changes)
    return Entry(method, placed, known.get(method, AS_PUBLISHED))


def _place(change: str, modality: str) -> str:
    head = change.partition("=")[0].partition(".")[0]
    return change if head in MODALITIES[modality].model_fields else f"method.{change}"


def parse_entries(texts: Sequence[str], task: str, *, published: bool = False) -> tuple[Entry, ...]:
    """Read all competitors."""
    return tuple(parse_entry(text, task, published=published) for text in texts)
