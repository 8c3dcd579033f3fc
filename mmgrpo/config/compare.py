"""Whether two configurations describe the same training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FREE_KEYS = (
    "run_dir", "resume", "tracking", "speed", "reward_failure", "reward_timeout_s",
    "model.gradient_checkpointing", "trainer.steps", "trainer.max_decisions",
    "trainer.max_seconds", "trainer.save_every",
    "trainer.keep_checkpoints", "trainer.micro_batch_size",
)  # fmt: skip
"""Keys that may change between a run and the run that resumes it.

They do not change what is computed, but for its length and its rounding; or they are what someone
has to change to get past an error.
"""


def first_difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Name the first key that shapes the training and differs, or return None.

    Both are ``Config.model_dump()`` or what was read back from the file it was written to.
    """
    old, new = _flatten(saved), _flatten(given)
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_KEYS)
        if not free and old.get(key) != new.get(key):
            return f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
    return None


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or (not tree and prefix):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
