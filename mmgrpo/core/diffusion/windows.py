"""Where a window of denoising steps stands in the course of training (MixGRPO, arXiv:2507.21802).

The window starts at step 0, stays some iterations at each place, moves by a stride, and starts
again behind the last step. All of it is a function of the training iteration, so that there is
nothing to store in a checkpoint and every rank has the same window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Pace:
    """What tells how long a window stays.

    Attributes:
        end: M, number of steps that a window may contain.
        interval: iterations at the first place, tau.
        rate: of the exponential pace, per step.
        threshold: first step from which the exponential pace hurries.
    """

    end: int
    interval: int = 25
    rate: float = 0.1
    threshold: int = 13


def constant(start: int, pace: Pace) -> int:
    """Tau iterations at every place (``progressive``)."""
    return pace.interval


def decay(start: int, pace: Pace) -> int:
    """From tau at step 0 down to 1: floor(tau (1 - l/M) + l/M)."""
    passed = start / pace.end
    return max(1, math.floor(pace.interval * (1 - passed) + passed))


def exponential(start: int, pace: Pace) -> int:
    """Ceil(tau exp(-rate max(0, l - threshold)))."""
    return math.ceil(pace.interval * math.exp(-pace.rate * max(0, start - pace.threshold)))


PACES: Mapping[str, Callable[[int, Pace], int]] = MappingProxyType(
    {"constant": constant, "decay": decay, "exponential": exponential}
)


def window_start(iteration: int, times: Pace, *, stride: int = 1, pace: str = "constant") -> int:
    """Return the first step of the window at a training iteration.

    The public program also visits the place M, where its window is empty and the iteration
    trains nothing; here the window stays at M - 1 then, so the published timetable is kept and no
    iteration is lost.

    Args:
        iteration: from 0.
        times: how long the window stays at a place.
        stride: steps that the window moves by.
        pace: a name in :data:`PACES`.

    Raises:
        ValueError: an unknown pace, or a number out of range.
    """
    if pace not in PACES:
        raise ValueError(f"unknown pace '{pace}'; valid: {', '.join(PACES)}.")
    if stride < 1 or times.interval < 1 or iteration < 0 or times.rate < 0:
        raise ValueError(
            f"expected stride >= 1, interval >= 1, rate >= 0 and iteration >= 0; got stride "
            f"{stride}, interval {times.interval}, rate {times.rate}, iteration {iteration}."
        )
    places = range(0, times.end + 1, stride)
    stays = [PACES[pace](place, times) for place in places]
    left = iteration % sum(stays)
    for place, stay in zip(places, stays, strict=True):
        if left < stay:
            return min(place, times.end - 1)
        left -= stay
    raise AssertionError("the stays cover their sum")
