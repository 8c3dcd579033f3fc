"""Independent random streams named by integers.

A sample's stream is named by what it is (seed, prompt, sample number), never by its place in the
batch, so a batch can be cut in any way without a changed result.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def mix_seed(*ints: int) -> int:
    """Return a well mixed, platform-independent seed in ``[0, 2**63)`` for a tuple of integers.

    Each integer (taken modulo 2**64) is absorbed by a round of splitmix64 (Steele, Lea and Flood,
    2014), so order and length matter: ``mix_seed(1, 2) != mix_seed(2, 1) != mix_seed(2, 1, 0)``.
    Plain arithmetic such as ``seed + index`` would give neighbouring runs the same samples.

    Raises:
        ValueError: no integer was given.
    """
    if not ints:
        raise ValueError("mix_seed needs at least one integer.")
    state = len(ints)
    for value in ints:
        state = _splitmix64(state ^ _splitmix64(value & _MASK))
    return state >> 1


def generator(*ints: int) -> torch.Generator:
    """Return a CPU generator seeded by :func:`mix_seed`; the same stream on every device."""
    return torch.Generator().manual_seed(mix_seed(*ints))


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
