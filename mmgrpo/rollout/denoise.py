"""The denoising loop: every distinct state goes through the network once, however many share it.

Shapes: B rows (samples), T steps. ``owner [B, T + 1]`` names, for each row and level, the first row
that has the same state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgrpo.core.diffusion import STD_FLOOR, StepRule, Suffix, transition
from mmgrpo.errors import MmgrpoError

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(states ``[N, ...]``, noise level, their rows ``[N]``) -> velocities ``[N, ...]``."""
Noise = Callable[[Tensor, int], Tensor]
"""(rows ``[N]``, step) -> standard normal ``[N, ...]``."""


@dataclass(frozen=True)
class Course:
    """How the rows of one rollout go.

    Attributes:
        sigmas: ``[T + 1]`` noise levels.
        rule: of the stochastic steps.
        suffix: what follows the last of them.
        stochastic: ``[T]`` bool, on the CPU.
        owner: ``[B, T + 1]`` int64.
        stratum: ``[B]`` int64, which of the suffix's grids a row ends on.
    """

    sigmas: Tensor
    rule: StepRule
    suffix: Suffix
    stochastic: Tensor
    owner: Tensor
    stratum: Tensor


@dataclass(frozen=True)
class Drawn:
    """What the rows went through.

    Where a suffix with its own grid replaces the last steps, their states are the final one, and
    they have no velocity: it is 0.

    Attributes:
        latents: ``[B, T + 1, ...]`` states.
        log_prob: ``[B, T]``.
        random: ``[T]`` bool, decisions with a density.
        velocity: T times ``[B, ...]``, at the state before each step.
    """

    latents: Tensor
    log_prob: Tensor
    random: Tensor
    velocity: list[Tensor]


@dataclass(frozen=True)
class _Step:
    """What a step gives each row, and the std (``[]``) of the step."""

    x_next: Tensor
    velocity: Tensor
    log_prob: Tensor
    std: Tensor


@dataclass(frozen=True)
class _Level:
    """N distinct states: the first row of each ``[N]``, and each row's among them ``[B]``."""

    rows: Tensor
    place: Tensor


def denoise(start: Tensor, course: Course, velocity: Velocity, noise: Noise) -> Drawn:
    """Take ``[B, ...]`` pure noise to clean latents."""
    steps, states, levels = len(course.stochastic), [start], _levels(course.owner)
    log_probs, stds, velocities = [], [], []
    last = int(course.stochastic.nonzero().max()) if course.stochastic.any() else steps
    own_grid = course.suffix.plain or last >= steps
    stop = steps if own_grid else last + 1
    step = None
    for index in range(stop):
        step = _advance(states[-1], index, levels, course, velocity, noise)
        states.append(step.x_next)
        log_probs.append(step.log_prob)
        stds.append(step.std)
        velocities.append(step.velocity)
    if step is not None and not own_grid:
        clean = states[-2] - course.sigmas[stop - 1] * step.velocity
        final = _solve(step.x_next, clean, stop, course, velocity)
        states += [final] * (steps - stop)
        log_probs += [torch.zeros_like(step.log_prob)] * (steps - stop)
        stds += [torch.zeros_like(step.std)] * (steps - stop)
        velocities += [torch.zeros_like(step.velocity)] * (steps - stop)
    random, log_prob = torch.stack(stds) >= STD_FLOOR, torch.stack(log_probs, dim=1)
    return Drawn(torch.stack(states, dim=1), log_prob * random, random, velocities)


def _levels(owner: Tensor) -> list[_Level]:
    """Return the distinct states of each of the ``T + 1`` levels."""
    changed = (owner[:, 1:] != owner[:, :-1]).any(dim=0).tolist()
    levels: list[_Level] = []
    for index, differs in enumerate([True, *changed]):
        levels.append(
            _Level(*torch.unique(owner[:, index], return_inverse=True)) if differs else levels[-1]
        )
    return levels


def _advance(
    x: Tensor,
    index: int,
    levels: Sequence[_Level],
    course: Course,
    velocity: Velocity,
    noise: Noise,
) -> _Step:
    sigma, sigma_next = course.sigmas[index], course.sigmas[index + 1]
    parents, children = levels[index], levels[index + 1]
    found = velocity(_rows(x, parents.rows), sigma, parents.rows)
    found = _rows(found, parents.place[children.rows])
    x = _rows(x, children.rows)
    if course.stochastic[index]:
        rule = course.rule.at(index)
        out = rule.step(found, x, sigma, sigma_next, noise=noise(children.rows, index))
        x_next, std, log_prob = out.x_next, out.std, out.log_prob
    else:
        x_next, std = _still(found, x, sigma, sigma_next, course.rule)
        log_prob = x_next.new_zeros(len(x_next))
    place = children.place
    return _Step(_rows(x_next, place), _rows(found, place), _rows(log_prob, place), std)


def _still(
    velocity: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, rule: StepRule
) -> tuple[Tensor, Tensor]:
    """Return the states after a step without noise, which has no density, and its std of 0."""
    still = rule.still
    return transition(
        still.kernel, velocity, x, sigma, sigma_next, eta=still.eta, sigma_max=still.sigma_max
    )


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, without a copy where every row has a state of its own.

    An owner is the first of its rows, so that as many indices as rows are all rows in order.
    """
    return values if len(index) == len(values) else values[index]


def _solve(at: Tensor, clean: Tensor, start: int, course: Course, velocity: Velocity) -> Tensor:
    """Return the final states ``[B, ...]``; ``clean`` is the last stochastic step's prediction."""
    final = torch.empty_like(at)
    for number, sigmas in enumerate(course.suffix.grids(course.sigmas, start)):
        ending = (course.stratum == number).nonzero().squeeze(1)
        rows, back = torch.unique(course.owner[ending, start], return_inverse=True)
        x, previous = at[rows], (clean[rows], course.sigmas[start - 1])
        for sigma, sigma_next in itertools.pairwise(sigmas):
            found = velocity(x, sigma, rows)
            x0 = x - sigma * found
            x = course.suffix.step(found, x, sigma, sigma_next, previous)
            previous = (x0, sigma)
        final[ending] = x[back]
    return final


def step_sizes(sigmas: Tensor, rule: StepRule) -> tuple[Tensor, Tensor]:
    """Std and length -dt of each step, ``[T]``; one that ends at sigma = 0 never draws noise."""
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    nothing = torch.zeros_like(sigma)
    eta = rule.at(torch.arange(len(sigma), device=sigma.device)).eta
    _, std = transition(
        rule.kernel, nothing, nothing, sigma, sigma_next, eta=eta, sigma_max=rule.sigma_max
    )
    return torch.where(sigma_next > 0, std, 0.0), sigma - sigma_next


def nodes(owner: Tensor, group_size: int, mask: Tensor) -> Tensor | None:
    """``[B, T]`` ids of the decisions within their group; None where no decision is shared."""
    steps = mask.shape[1]
    node = owner[:, 1:] % group_size * steps + torch.arange(steps, device=owner.device)
    row = torch.arange(len(owner), device=owner.device)[:, None]
    return node if ((owner[:, 1:] != row) & mask).any() else None


def check_finite(latents: Tensor) -> None:
    """Raise MmgrpoError where a final latent ``[B, ...]`` is not finite."""
    if not latents.isfinite().all():
        broken = int((~latents.flatten(1).isfinite().all(dim=1)).sum())
        raise MmgrpoError(
            f"{broken} of {len(latents)} images are not finite: the network overflows in its dtype "
            "or training has diverged; try dtype bfloat16 or float32, or a smaller learning rate."
        )
