"""Tells of groups whose rows are all finished, while others are still being made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor

from mmgrpo.protocols import OnSamples, Sample


class Announcer:
    """Waits for the rows of each group.

    Args:
        prompt_row: ``[B]`` int64, which prompt each row is of; those of a prompt are a group.
        make: (prompt, its rows) -> their samples.
        on_samples: is told of each group once.
    """

    def __init__(
        self,
        prompt_row: Tensor,
        make: Callable[[int, Tensor], list[Sample]],
        on_samples: OnSamples,
    ) -> None:
        self._prompt_row = prompt_row
        self._missing = Counter(prompt_row.tolist())
        self._make = make
        self._on_samples = on_samples
        self._made: dict[int, list[Sample]] = {}

    def finished(self, rows: Tensor) -> None:
        """Take note of finished rows ``[N]``, and tell of the groups that they complete."""
        done = Counter(self._prompt_row[rows].tolist())
        self._missing.subtract(done)
        for prompt in sorted(done):
            if self._missing[prompt] == 0:
                members = (self._prompt_row == prompt).nonzero().squeeze(1)
                self._made[prompt] = self._make(prompt, members)
                self._on_samples(self._made[prompt])

    @property
    def samples(self) -> list[Sample]:
        """The samples of all groups that were told of, prompt by prompt."""
        return [sample for _, made in sorted(self._made.items()) for sample in made]
