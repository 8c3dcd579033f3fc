"""Which denoising steps draw noise, and which of those are trained.

A step to sigma = 0, the last one of a flow model, is never stochastic: its std is nearly 0 or it
would leave visible noise in the image, and no decision follows it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mmgrpo.core.diffusion.topology import places
from mmgrpo.core.diffusion.windows import Pace, window_start
from mmgrpo.core.seeding import generator


@dataclass(frozen=True)
class Selection:
    """The steps of one rollout.

    Attributes:
        stochastic: ``[T]`` bool, steps that draw noise; the others follow the ODE.
        trained: ``[B, T]`` bool, decisions that enter the loss; a subset of the stochastic ones.
    """

    stochastic: Tensor
    trained: Tensor


@dataclass(frozen=True)
class Steps:
    """What a selection is made for.

    Attributes:
        count: T, the number of denoising steps.
        seed: names the rollout: what is drawn once for all samples comes from it.
        sample_seeds: ``[B]``, what is drawn per sample comes from the sample's own.
        iteration: training iteration, from 0; windows that move follow it.
    """

    count: int
    seed: int
    sample_seeds: Sequence[int]
    iteration: int = 0

    def shared(self, start: int, stop: int) -> Selection:
        """Train steps ``start`` to ``stop - 1`` of every sample."""
        index = torch.arange(self.count)
        stochastic = (index >= start) & (index < stop)
        return Selection(stochastic, stochastic.repeat(len(self.sample_seeds), 1))


def all_but_last(steps: Steps) -> Selection:
    """Every step but the last draws noise and is trained (Flow-GRPO, arXiv:2505.05470)."""
    return steps.shared(0, steps.count - 1)


def every(steps: Steps) -> Selection:
    """Every step draws noise and is trained (DDPO, arXiv:2305.13301).

    The engine takes out a step that ends at sigma = 0. For flow models that is the last one; the
    schedules of diffusion models may end a little above.
    """
    return steps.shared(0, steps.count)


def random_fraction(steps: Steps, *, fraction: float = 0.6) -> Selection:
    """Every step but the last draws noise; each sample trains its own random part of them.

    A sample keeps the first ``floor(fraction (T - 1))`` of a random permutation (DanceGRPO,
    arXiv:2505.07818).
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1]; got {fraction}.")
    candidates = steps.count - 1
    kept = math.floor(fraction * candidates + 1e-9)
    if kept < 1:
        raise ValueError(f"fraction {fraction} of {candidates} steps leaves no step to train.")
    trained = torch.zeros(len(steps.sample_seeds), steps.count, dtype=torch.bool)
    for row, sample_seed in enumerate(steps.sample_seeds):
        trained[row, torch.randperm(candidates, generator=generator(sample_seed))[:kept]] = True
    return Selection(torch.arange(steps.count) < candidates, trained)


def single(steps: Steps, *, step: int | None = None) -> Selection:
    """One step draws noise and is trained, the same for the whole rollout; random if None."""
    return window(steps, start=step, width=1)


def window(
    steps: Steps,
    *,
    width: int,
    start: int | None = None,
    first: int = 0,
    last: float | None = None,
) -> Selection:
    """Consecutive steps draw noise and are trained (MixGRPO, arXiv:2507.21802).

    Args:
        steps: what the selection is made for.
        width: number of steps; cut off after the last trainable step, T - 2.
        start: first step of the window, or None for a place drawn uniformly such that the window
            lies in ``[first, last)`` (Flow-GRPO-Fast).
        first: start of the range of random places.
        last: end of the range of random places; T - 1 if None. A float is a share of the schedule.
    """
    trainable = steps.count - 1
    (last,) = (trainable,) if last is None else places([last], steps.count)
    if width < 1 or not 0 <= first < last <= trainable:
        raise ValueError(
            f"expected width >= 1 and 0 <= first < last <= {trainable} (T - 1); "
            f"got width {width}, first {first}, last {last}."
        )
    _check_width(width, steps)
    if start is None:
        room = max(last - first - width, 0) + 1
        start = first + int(torch.randint(room, (1,), generator=generator(steps.seed)))
    if not 0 <= start < trainable:
        raise ValueError(f"the window must start in [0, {trainable - 1}] (T - 2); got {start}.")
    return steps.shared(start, min(start + width, trainable))


def moving_window(
    steps: Steps,
    *,
    width: int,
    stride: int = 1,
    pace: str = "constant",
    interval: int = 25,
    rate: float = 0.1,
    threshold: int = 13,
    last: int | None = None,
) -> Selection:
    """Consecutive steps draw noise and are trained, moving with training (MixGRPO, 2507.21802).

    The window is a pure function of the training iteration, the same for all samples and ranks.

    Args:
        steps: what the selection is made for.
        width: number of steps, at most those of the schedule; cut off at ``last``.
        stride: steps that the window moves by.
        pace: how long the window stays, a name in
            :data:`mmgrpo.core.diffusion.windows.PACES`.
        interval: iterations that the window stays at its first place, tau.
        rate: of the ``exponential`` pace, per step.
        threshold: first step from which the ``exponential`` pace hurries.
        last: end of the range of steps; T - 2 if None, as the authors have it.
    """
    end = steps.count - 2 if last is None else last
    if width < 1 or not 0 < end <= steps.count - 1:
        raise ValueError(
            f"expected width >= 1 and 0 < last <= {steps.count - 1} (T - 1); "
            f"got width {width}, last {end} (T - 2 where none is given)."
        )
    _check_width(width, steps)
    times = Pace(end, interval, rate, threshold)
    start = window_start(steps.iteration, times, stride=stride, pace=pace)
    return steps.shared(start, min(start + width, end))


def _check_width(width: int, steps: Steps) -> None:
    if width > steps.count:
        raise ValueError(f"a window of {width} steps is larger than the schedule of {steps.count}.")


def listed(steps: Steps, *, at: Sequence[int | float]) -> Selection:
    """The given steps draw noise and are trained (BranchGRPO-Mix, arXiv:2509.06040).

    Args:
        steps: what the selection is made for.
        at: steps; a float is a share of the schedule, rounded down to a step.
    """
    chosen = places(at, steps.count)
    if not chosen or chosen[0] < 0 or chosen[-1] > steps.count - 2:
        raise ValueError(f"steps must lie in [0, {steps.count - 2}] (T - 2); got {list(at)}.")
    stochastic = torch.zeros(steps.count, dtype=torch.bool)
    stochastic[chosen] = True
    return Selection(stochastic, stochastic.repeat(len(steps.sample_seeds), 1))


def pruned_depths(
    steps: Steps, *, depths: Sequence[int | float], interval: int | None = None, stop: int = 0
) -> Selection:
    """Every step but the last draws noise; some depths of the tree are not trained.

    Depth pruning of BranchGRPO (arXiv:2509.06040): step i leads to depth i + 1. The tree is drawn
    and scored as a whole, only the update gets cheaper.

    Args:
        steps: what the selection is made for.
        depths: left out; a float is a share of the schedule, rounded down.
        interval: the set moves one depth towards the root every so many iterations; None: never.
        stop: the shallowest depth that a moving set reaches.
    """
    chosen = places(depths, steps.count)
    if not chosen or chosen[0] < 1 or chosen[-1] > steps.count:
        raise ValueError(f"depths must lie in [1, {steps.count}] (T); got {list(depths)}.")
    if interval is not None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1; got {interval}.")
        moved = min(steps.iteration // interval, max(chosen[0] - max(stop, 1), 0))
        chosen = [depth - moved for depth in chosen]
    whole = all_but_last(steps)
    kept = ~torch.isin(torch.arange(1, steps.count + 1), torch.tensor(chosen))
    if not (kept & whole.stochastic).any():
        raise ValueError(f"without the depths {chosen} there is no step to train.")
    return Selection(whole.stochastic, whole.trained & kept)


SELECTORS: Mapping[str, Callable[..., Selection]] = MappingProxyType(
    {
        "all": every,
        "all_but_last": all_but_last,
        "random_fraction": random_fraction,
        "single": single,
        "window": window,
        "moving_window": moving_window,
        "listed": listed,
        "pruned_depths": pruned_depths,
    }
)


def select_steps(
    selection: Mapping[str, Any],
    num_steps: int,
    *,
    seed: int,
    sample_seeds: Sequence[int],
    iteration: int = 0,
) -> Selection:
    """Return the steps that a rollout of B samples makes stochastic and trains.

    Args:
        selection: ``{"kind": name in SELECTORS, **its options}``.
        num_steps: T, at least 2.
        seed: names the rollout: what is drawn once for all samples comes from it.
        sample_seeds: ``[B]``, what is drawn per sample comes from the sample's own, so that the
            result does not depend on the batch.
        iteration: training iteration, from 0; windows that move follow it.

    Raises:
        ValueError: unknown kind or option, or a selection without a step.
    """
    options = dict(selection)
    kind = options.pop("kind", None)
    if kind not in SELECTORS:
        raise ValueError(f"unknown selection '{kind}'; valid: {', '.join(SELECTORS)}.")
    if num_steps < 2:
        raise ValueError(f"a stochastic rollout needs at least 2 steps; got {num_steps}.")
    steps = Steps(num_steps, seed, sample_seeds, iteration)
    signature = inspect.signature(SELECTORS[kind])
    try:
        signature.bind(steps, **options)
    except TypeError as error:
        known = list(signature.parameters)[1:]
        raise ValueError(f"selection '{kind}': {error}; its options: {known}.") from None
    return SELECTORS[kind](steps, **options)
