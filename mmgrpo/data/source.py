"""Which prompts a step trains on, as a function of the step and the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mmgrpo.errors import DataError
from mmgrpo.protocols import Prompt


class PromptSource:
    """An endless stream of batches over a list of prompts.

    Shuffled, every epoch is a fresh permutation cut into ``len // size`` batches; the remainder,
    another one in each epoch, is left out, so no batch holds a prompt twice. Unshuffled, the
    batches go round the list in order.

    Args:
        prompts: at least one.
        seed: of the permutations; together with the epoch it decides the order.
        shuffle: see above.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise DataError("a prompt source needs at least one prompt; got none.")
        self._prompts = list(prompts)
        self._seed = seed
        self._shuffle = shuffle

    def __len__(self) -> int:
        return len(self._prompts)

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> list[Prompt]:
        """Return the rank's contiguous slice of the step's ``size`` prompts.

        Args:
            step: counted from 0.
            size: prompts over all ranks.
            rank: this process.
            world: number of processes.

        Raises:
            DataError: fewer prompts than ``size``.
        """
        if not 1 <= size <= len(self):
            raise DataError(
                f"a step needs {size} different prompts and the data has {len(self)}; "
                "lower the number of prompts per step or add data."
            )
        positions = self._positions(step, size)
        mine = positions[size * rank // world : size * (rank + 1) // world]
        return [self._prompts[position] for position in mine]

    def all(self, limit: int | None = None) -> list[Prompt]:
        """The first ``limit`` prompts in the order of the file; all without a limit."""
        return self._prompts[:limit]

    def _positions(self, step: int, size: int) -> Sequence[int]:
        if not self._shuffle:
            return [(step * size + offset) % len(self) for offset in range(size)]
        epoch, batch = divmod(step, len(self) // size)
        return _permutation(len(self), self._seed, epoch)[batch * size : (batch + 1) * size]


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = np.random.default_rng([seed, epoch])
    return tuple(generator.permutation(length).tolist())
