"""TensorBoard, Weights & Biases and trackio, through accelerate's trackers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmgrpo.errors import MissingExtraError


class ExternalTracker:
    """One of accelerate's trackers behind the tracker protocol; only finite numbers are sent.

    Args:
        tracker: an ``accelerate.tracking.GeneralTracker``.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send the step's numbers."""
        numbers = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value) and name != "step"
        }
        self._tracker.log(numbers, step=step)

    def truncate_after(self, step: int) -> None:
        """Nothing: what was sent is not taken back, and a resumed run sends equal numbers."""

    def close(self) -> None:
        """Flush and finish."""
        self._tracker.finish()


def _open(
    package: str, make: Callable[[Any, Path], Any], run_dir: Path, config: Mapping[str, Any]
) -> ExternalTracker:
    """Open a tracker of the run.

    Raises:
        MissingExtraError: its package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a mere folder of that name is no package
        raise MissingExtraError(package, "tracking")
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's trackers ask it which process they are in
    tracker = make(tracking, Path(run_dir))
    tracker.start()
    tracker.store_init_configuration(flatten(config))
    return ExternalTracker(tracker)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Return nested settings as ``section.key``; what is not a number or a truth value is text."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float) else str(value)
    return flat


Opener = Callable[[Path, Mapping[str, Any]], ExternalTracker]

tensorboard: Opener = partial(
    _open,
    "tensorboard",
    lambda tracking, run_dir: tracking.TensorBoardTracker("tensorboard", run_dir),
)
wandb: Opener = partial(
    _open,
    "wandb",
    lambda tracking, run_dir: tracking.WandBTracker("mmgrpo", name=run_dir.name, dir=str(run_dir)),
)
trackio: Opener = partial(
    _open,
    "trackio",
    lambda tracking, run_dir: tracking.TrackioTracker("mmgrpo", name=run_dir.name),
)
