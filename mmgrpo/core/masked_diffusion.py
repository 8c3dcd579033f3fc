"""Masked diffusion language models: which tokens are hidden when a response's likelihood is read.

A **view** of a response hides some of its tokens; the model predicts the hidden ones from the rest.
Three likelihoods are sums over views, and differ in nothing else. Shapes: B responses of up to L
tokens, K views of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmgrpo.core.seeding import generator


@dataclass(frozen=True)
class MaskedRule:
    """What the decisions of a masked diffusion model are.

    Attributes:
        likelihood: ``path`` each token, as it was unmasked in the rollout (its log-probability is
            exact); ``elbo`` random views, each an estimate of the response's ELBO; ``sites`` each
            token given all others.
        draws: number of random views n.
        masks_per_time: how many views share their noise level; 1 has the least variance.
    """

    likelihood: Literal["path", "elbo", "sites"] = "path"
    draws: int = 8
    masks_per_time: int = 1

    def __post_init__(self) -> None:
        for name in ("draws", "masks_per_time"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


class Views(NamedTuple):
    """Views of responses.

    Attributes:
        hidden: ``[B, K, L]`` bool, tokens that the model does not see.
        scored: ``[B, K, L]`` bool, tokens whose log-probability counts.
        weight: ``[B, K]`` float32 factor of a view's log-probabilities.
    """

    hidden: Tensor
    scored: Tensor
    weight: Tensor


def path_views(step: Tensor, length: Tensor, steps: int) -> Views:
    """The states that a response went through while it was unmasked.

    Args:
        step: ``[B, L]`` int64, when each token was unmasked.
        length: ``[B]`` tokens that count.
        steps: number of steps K.
    """
    number = torch.arange(steps, device=step.device)[None, :, None]
    counts = _counts(step.shape[1], length)
    hidden = step[:, None] >= number
    scored = (step[:, None] == number) & counts
    return Views(hidden, scored, torch.ones(scored.shape[:2], device=step.device))


def site_views(width: int, length: Tensor) -> Views:
    """Each token hidden alone: the log-probabilities are those of the pseudo-likelihood."""
    alone = torch.eye(width, dtype=torch.bool, device=length.device)[None]
    scored = alone & _counts(width, length)
    return Views(scored, scored, torch.ones(scored.shape[:2], device=length.device))


def elbo_views(
    width: int, length: Tensor, names: Sequence[tuple[int, ...]], rule: MaskedRule
) -> Views:
    """Random views, each an unbiased estimate of the ELBO (LLaDA 1.5, arXiv:2505.19223, eq. 4).

    The number l of hidden tokens is uniform in 1..L, the tokens are any l of them, and the view's
    weight is L / l: hiding each with probability t ~ U(0, 1] and weight 1 / t has the same mean,
    and weights without bound. Tokens after the end are never hidden.

    Args:
        width: tokens of a row.
        length: ``[B]`` tokens L that count.
        names: a random stream for each response. Responses of one name share their random numbers.
        rule: how many views.
    """
    device = length.device
    levels, keys = zip(*(_draw(name, width, rule) for name in names), strict=True)
    size = (torch.stack(levels).to(device) * length[:, None]).floor().long() + 1
    key = torch.stack(keys).to(device)
    key = torch.where(_counts(width, length).expand_as(key), key, 2.0)
    hidden = key.argsort(dim=-1).argsort(dim=-1) < size[..., None]
    return Views(hidden, hidden, (length[:, None] / size).float())


def _draw(name: tuple[int, ...], width: int, rule: MaskedRule) -> tuple[Tensor, Tensor]:
    """Uniforms ``[K]`` for the numbers, and ``[K, width]`` for the choice, of one response."""
    stream = generator(*name)
    count = -(-rule.draws // rule.masks_per_time)
    level = torch.rand(count, generator=stream, dtype=torch.float64)
    level = level.repeat_interleave(rule.masks_per_time)[: rule.draws]
    return level, torch.rand(rule.draws, width, generator=stream, dtype=torch.float64)


def _counts(width: int, length: Tensor) -> Tensor:
    """``[B, 1, L]`` bool: tokens before the end."""
    return (torch.arange(width, device=length.device) < length[:, None])[:, None]


def reveal_order(keys: Tensor, steps: int, block: int | None = None) -> Tensor:
    """When each token is unmasked, if the order is drawn before the tokens are.

    Args:
        keys: ``[B, L]`` random numbers; within a block the smallest goes first.
        steps: number of steps, at least one for each block.
        block: length of the blocks that are completed one after the other; None: one block.

    Returns:
        ``[B, L]`` int64 in 0 .. steps - 1, each step as often as the others, but for rounding.

    Raises:
        ValueError: fewer steps than blocks.
    """
    plan = step_plan(keys.shape[1], steps, block)
    place = torch.arange(keys.shape[1], device=keys.device)
    blocked = keys + 2.0 * (place // (block or keys.shape[1]))
    rank = blocked.argsort(dim=1).argsort(dim=1)
    return plan.to(keys.device)[rank]


def step_plan(width: int, steps: int, block: int | None = None) -> Tensor:
    """``[L]`` int64: the step in which the n-th token is unmasked.

    Raises:
        ValueError: fewer steps than blocks.
    """
    block = min(block or width, width)
    blocks = -(-width // block)
    if steps < blocks:
        raise ValueError(f"{blocks} blocks need at least as many steps; got {steps}.")
    plan: list[int] = []
    for number in range(blocks):
        first, last = number * steps // blocks, (number + 1) * steps // blocks
        size = min(block, width - number * block)
        plan += [first + place * (last - first) // size for place in range(size)]
    return torch.tensor(plan)
