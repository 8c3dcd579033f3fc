"""Score-entropy policy optimisation (SEPO, arXiv:2502.01384): discrete diffusion by its scores.

A concrete score s(x)_y stands for p(y) / p(x). For a masked model and neighbours y that differ from
x in one token, it is the quotient of two probabilities of that token given the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.objectives import Decisions, Surrogate


def score_entropy(decisions: Decisions, *, low: float = 0.2, high: float = 0.2) -> Surrogate:
    """Score entropy, summed over the neighbours that differ in the decision's token.

    With pi(y) normalised over the tokens of one place, the importance ratio of every neighbour is
    that of the token itself, and the sum of pi(y) grad log s(x)_y is -grad log p(x). So what is
    left of :func:`neighbour_losses` is -min(r A, clip(r) A) log_prob with the bound detached:
    unlike PPO's it limits the weight and never stops the gradient.

    Args:
        decisions: ``log_prob`` of each token given all others.
        low: lower clip width.
        high: upper clip width.

    Raises:
        ValueError: the clip widths are not 0 <= low < 1 and 0 <= high.
    """
    ratio = decisions.log_ratio.detach().exp()
    weight = bounded_weight(ratio, decisions.advantage, low=low, high=high)
    kept = weight == ratio * decisions.advantage
    return Surrogate(-weight * decisions.log_prob, kept)


def neighbour_losses(
    log_score: Tensor,
    old_log_score: Tensor,
    log_pi: Tensor,
    old_log_pi: Tensor,
    advantage: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """The general loss (eq. 9): sum over neighbours y of w_xy log s(x)_y, to be minimised.

    w_xy = pi(y) min(r A, clip(r) A) without gradient, r = pi(y) s_old(x)_y / (pi_old(y) s(x)_y).

    Args:
        log_score: ``[..., Y]`` log s(x)_y, differentiable.
        old_log_score: ``[..., Y]`` under the old policy.
        log_pi: ``[..., Y]`` log pi(y).
        old_log_pi: ``[..., Y]`` under the old policy.
        advantage: ``[...]``.
        low: lower clip width.
        high: upper clip width.

    Returns:
        ``[...]``.
    """
    ratio = (log_pi - old_log_pi + old_log_score - log_score).detach().exp()
    bounded = bounded_weight(ratio, advantage[..., None], low=low, high=high)
    return (log_pi.detach().exp() * bounded * log_score).sum(dim=-1)


def bounded_weight(ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A).

    Raises:
        ValueError: the clip widths are not 0 <= low < 1 and 0 <= high.
    """
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"clip widths must be 0 <= low < 1 and high >= 0; got {low}, {high}")
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.minimum(ratio * advantage, clipped * advantage)
