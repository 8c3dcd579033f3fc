"""What follows the last stochastic step: the same grid along the ODE, or fewer, better steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from mmgrpo.core.diffusion.solvers import dpmpp_2m

Previous = tuple[Tensor, Tensor] | None
"""Clean prediction ``[B, ...]`` and noise level of the step before."""


def _first_order(
    x0: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, previous: Previous
) -> Tensor:
    """Euler step, written in the clean prediction."""
    return x + (x - x0) / sigma * (sigma_next - sigma)


def _second_order(
    x0: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, previous: Previous
) -> Tensor:
    return dpmpp_2m(x0, x, sigma, sigma_next, previous=previous)


SOLVERS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor, Previous], Tensor]] = (
    MappingProxyType({"euler": _first_order, "dpmpp_2m": _second_order})
)


@dataclass(frozen=True)
class Suffix:
    """A deterministic solver on fewer points after the last stochastic step.

    One sparse grid (MixGRPO-Flash, arXiv:2507.21802), or one for each granularity, on each of
    which every sample ends once more (G2RPO, arXiv:2510.01982). By default the points are those of
    the rollout's own grid.

    Attributes:
        solver: a name in :data:`SOLVERS`.
        fraction: rho: ``int(rho (T - e))`` points, both ends counted, after last step e.
        strides: lambda: every how many steps of the rollout's grid the solver stops.
    """

    solver: str = "euler"
    fraction: float = 1.0
    strides: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver '{self.solver}'; valid: {', '.join(SOLVERS)}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1]; got {self.fraction}.")
        if not self.strides or min(self.strides) < 1 or len(set(self.strides)) < len(self.strides):
            raise ValueError(f"strides must be different and at least 1; got {self.strides}.")
        if self.fraction < 1 and self.strides != (1,):
            raise ValueError("fraction and strides both thin the steps out; set one of them.")

    @property
    def plain(self) -> bool:
        """Whether this is the rollout's own ODE, so that nothing has to be done."""
        return self == Suffix()

    def grids(self, schedule: Tensor, start: int) -> list[Tensor]:
        """Return the noise levels of each granularity, see :meth:`sigmas`."""
        return [self.sigmas(schedule, start, stride=stride) for stride in self.strides]

    def sigmas(self, schedule: Tensor, start: int, *, stride: int = 1) -> Tensor:
        """Return the ``[P]`` noise levels from step ``start`` (= e + 1) to 0.

        The points are uniform before the shift, as the schedule's own are. Where the published
        count leaves one point, which would never reach sigma = 0, there are two. With a stride the
        points are ``start`` and every stride-th from the next on; a last one that is not 0 gives
        way to 0, so that what is decoded is the clean prediction of the last step.

        Args:
            schedule: ``[T + 1]`` noise levels of the rollout.
            start: index of the first of them that the solver starts from, at least 1.
            stride: steps of the schedule in one step of the solver.
        """
        steps = len(schedule) - 1
        if stride > 1:
            sparse = schedule[[start, *range(start + 1, steps + 1, stride)]]
            return torch.cat([sparse[:-1], sparse.new_zeros(1)])
        count = max(int((steps - start + 1) * self.fraction + 1e-9), 2)
        return respace(schedule, torch.linspace(start, steps, count, dtype=torch.float64))

    def step(
        self, velocity: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, previous: Previous
    ) -> Tensor:
        """Return the next state ``[B, ...]``."""
        x0 = x - sigma * velocity
        return SOLVERS[self.solver](x0, x, sigma, sigma_next, previous)


def respace(schedule: Tensor, places: Tensor) -> Tensor:
    """Noise levels ``[P]`` at fractional places of a schedule, float32; the last one is 0.

    A shifted schedule is ``s u / (1 + (s - 1) u)`` of the uniform ``u = 1 - i/T``. Its shift s is
    read off the stored levels and interpolated (in the logarithm) between them: exact for static
    and dynamic shifts, whose s is one number, and smooth for the others.

    Args:
        schedule: ``[T + 1]`` noise levels, falling to 0.
        places: ``[P]`` float64 indices, rising from at least 1 to T.
    """
    steps = len(schedule) - 1
    if steps < 2:
        return schedule[places.long()]
    inner = schedule[1:-1].double()
    uniform = 1 - torch.arange(1, steps, dtype=torch.float64, device=schedule.device) / steps
    log_shift = torch.logit(inner) - torch.logit(uniform)
    at = (places.to(schedule.device) - 1).clamp(0, steps - 2)
    low = at.floor().long()
    high = (low + 1).clamp_max(steps - 2)
    shift = torch.lerp(log_shift[low], log_shift[high], at - low).exp()
    rest = 1 - places.to(schedule.device) / steps
    sigmas = shift * rest / (1 + (shift - 1) * rest)
    whole = places == places.round()
    sigmas[whole] = schedule.double()[places[whole].long()]
    sigmas[-1] = 0
    return sigmas.to(schedule.dtype)
