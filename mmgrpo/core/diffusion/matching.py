"""Decisions on the forward process: noised clean samples in place of denoising steps.

A decision is one (noise, level) draw on a clean sample, which any solver may have drawn. Minus the
network's weighted error at the noised sample stands in for the decision's log-probability (AWM,
arXiv:2509.25050).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from mmgrpo.core.diffusion.gaussian import at_least_float32, over_elements

SMOOTHING = 1e-10
"""Keeps the slope of the Huber weights finite where the error is 0."""


def _huber(error: Tensor, sigma: Tensor, power: float) -> Tensor:
    return sigma * ((error + SMOOTHING) ** power - SMOOTHING**power) / power


WEIGHTS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = MappingProxyType(
    {
        "uniform": lambda error, sigma, power: error,
        "sigma": lambda error, sigma, power: sigma * error,
        "sigma_squared": lambda error, sigma, power: sigma**2 * error,
        "huber": lambda error, sigma, power: _huber(error, sigma, 0.5) / 2,
        "generalised_huber": _huber,
    }
)
"""How a mean squared error ``[N]`` counts at noise levels ``[N]``, given a power."""


def _stratified(draws: int, shift: float, schedule: Tensor, stream: Generator) -> Tensor:
    place = torch.randperm(draws, generator=stream)
    return _shifted((place + torch.rand(draws, generator=stream)) / draws, shift)


def _uniform(draws: int, shift: float, schedule: Tensor, stream: Generator) -> Tensor:
    return _shifted(torch.rand(draws, generator=stream), shift)


def _scheduled(draws: int, shift: float, schedule: Tensor, stream: Generator) -> Tensor:
    return schedule[torch.randperm(len(schedule) - 1, generator=stream)[:draws]]


def _shifted(share: Tensor, shift: float) -> Tensor:
    return shift * share / (1 + (shift - 1) * share)


TIMES: Mapping[str, Callable[[int, float, Tensor, Generator], Tensor]] = MappingProxyType(
    {"stratified": _stratified, "uniform": _uniform, "schedule": _scheduled}
)
"""How K noise levels of a sample are drawn: one in each K-th of (0, 1), anywhere in it, or
different ones of the rollout's own."""


@dataclass(frozen=True)
class MatchingRule:
    """How clean samples are noised, and how a velocity's error there counts.

    Attributes:
        draws: (noise, level) draws per sample, K; a float is a share of the rollout's steps,
            rounded down. 0: the decisions are denoising steps.
        times: a name in :data:`TIMES`.
        shift: of the drawn levels towards noise, ``s u / (1 + (s - 1) u)``; 1 is none.
        weight: a name in :data:`WEIGHTS`.
        power: of ``generalised_huber``.
        shared: all samples of a group have the same noise and levels.
    """

    draws: int | float = 0
    times: str = "stratified"
    shift: float = 1.0
    weight: str = "uniform"
    power: float = 0.25
    shared: bool = False

    def __post_init__(self) -> None:
        for name, table in (("times", TIMES), ("weight", WEIGHTS)):
            if getattr(self, name) not in table:
                raise ValueError(
                    f"unknown {name} '{getattr(self, name)}'; valid: {', '.join(table)}."
                )
        if self.draws < 0 or (isinstance(self.draws, float) and self.draws > 1):
            raise ValueError(f"draws must be at least 0, or a share up to 1.0; got {self.draws}.")
        if self.shift <= 0 or self.power <= 0:
            raise ValueError(
                f"shift and power must be positive; got {self.shift} and {self.power}."
            )
        if self.times == "schedule" and self.shift != 1:
            raise ValueError(f"times 'schedule' is shifted as it is; got shift {self.shift}.")

    @property
    def on(self) -> bool:
        """Whether decisions are draws on clean samples."""
        return self.draws > 0

    def count(self, num_steps: int) -> int:
        """Return K for a rollout of so many steps.

        Raises:
            ValueError: fewer steps than draws of ``times`` 'schedule'.
        """
        if isinstance(self.draws, float):
            return max(int(self.draws * num_steps + 1e-9), 1)
        if self.times == "schedule" and self.draws > num_steps:
            raise ValueError(
                f"a rollout of {num_steps} steps does not have {self.draws} noise levels."
            )
        return self.draws

    def sigmas(self, schedule: Tensor, stream: Generator) -> Tensor:
        """Draw ``[K]`` noise levels, float32.

        Args:
            schedule: ``[S + 1]`` noise levels of the rollout.
            stream: CPU generator.
        """
        count = self.count(len(schedule) - 1)
        return TIMES[self.times](count, self.shift, schedule.cpu(), stream).float()

    def log_prob(self, velocity: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """Return ``[N]`` minus the weighted mean squared error over the elements.

        Args:
            velocity: ``[N, ...]`` the network's prediction.
            target: ``[N, ...]`` what it should have predicted.
            sigma: ``[N]``.
        """
        gap = at_least_float32(velocity) - at_least_float32(target)
        return -WEIGHTS[self.weight](over_elements(gap**2, "mean"), sigma, self.power)
