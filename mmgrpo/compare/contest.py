"""Who competes, over which seeds, with which budget. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmgrpo.config import Config, load_config
from mmgrpo.config.modalities import MODALITIES
from mmgrpo.errors import ConfigError, nearest


@dataclass(frozen=True)
class Entry:
    """One competitor: a preset and what is changed in it.

    Attributes:
        method: preset id.
        overrides: ``key=value`` changes of the run, method slots under ``method.``.
    """

    method: str
    overrides: tuple[str, ...] = ()

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
        task: ``text``, ``vision`` or ``image``.
        entries: the competitors.
        seeds: number of seeds, from 0.
        budget: ``key=value`` settings that every run shares, such as ``trainer.steps=100``.
        out: folder of all runs and of the report.
    """

    task: str
    entries: tuple[Entry, ...]
    seeds: int
    budget: tuple[str, ...]
    out: Path

    def run_dir(self, entry: Entry, seed: int) -> Path:
        """Folder of one run."""
        return self.out / entry.folder / f"seed{seed}"

    def overrides(self, entry: Entry, seed: int) -> list[str]:
        """Everything that a run changes in the task's quickstart configuration."""
        return [
            *self.budget,
            f"method={entry.method}",
            *entry.overrides,
            f"seed={seed}",
            f"run_dir={self.run_dir(entry, seed)}",
        ]

    def config(self, entry: Entry, seed: int) -> Config:
        """The checked configuration of one run."""
        return load_config(f"quickstart/{self.task}", self.overrides(entry, seed))

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


def parse_entry(text: str, task: str) -> Entry:
    """Read ``"flow-grpo advantage.scale=group trainer.learning_rate=1e-4"``.

    A change whose first key is no section of a configuration belongs to the method.

    Raises:
        ConfigError: no such task, or an empty entry.
    """
    if task not in MODALITIES:
        raise ConfigError(f"unknown task '{task}'{nearest(task, MODALITIES)}")
    if not text.strip():
        raise ConfigError("a competitor is a method id and its changes; got an empty text.")
    method, *changes = text.split()
    return Entry(method, tuple(_place(change, task) for change in changes))


def _place(change: str, task: str) -> str:
    head = change.partition("=")[0].partition(".")[0]
    return change if head in MODALITIES[task].model_fields else f"method.{change}"


def parse_entries(texts: Sequence[str], task: str) -> tuple[Entry, ...]:
    """Read all competitors."""
    return tuple(parse_entry(text, task) for text in texts)
