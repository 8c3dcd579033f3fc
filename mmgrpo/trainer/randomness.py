"""The global random generators: seeded at the start, saved and restored with a checkpoint.

The package itself draws from streams of its own (:mod:`mmgrpo.core.seeding`); these are for what
users and libraries draw.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed every global generator; ``seed`` is any non-negative integer."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - rewards may draw from the global state
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of every global generator as plain JSON values."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in devices],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_from_text(text) for text in state["cuda"]])


def _to_text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
