"""Surrogates on the forward process: decision t of a row is its t-th (noise, level) draw.

Each reads how far the network's velocity is from the one that leads back to the clean sample. Where
the decisions carry log-probabilities only, these are minus that error, see
:class:`mmgrpo.core.diffusion.MatchingRule`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.groups import group_index
from mmgrpo.core.objectives import Decisions, Matching, Surrogate, TrustRegion

SMALLEST_ERROR = 1e-5
"""Floor of the mean absolute error that normalises a squared one."""


def negative_aware(
    decisions: Decisions, *, beta: float = 1.0, bound: float = 5.0, self_normalised: bool = True
) -> Surrogate:
    """Fit an implicit positive policy to good samples, a negative one to bad (DiffusionNFT).

    arXiv:2509.16117. With v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v the
    loss is (r E(v+) + (1 - r) E(v-)) bound / beta; r in [0, 1] is the sample's optimality and E the
    mean squared error of the clean sample that a velocity predicts.

    Args:
        decisions: see :class:`Decisions`; reads ``matching``.
        beta: guidance strength, how far v+ and v- lie from v_old.
        bound: A_max: the advantage at which a sample is all positive (r = 1).
        self_normalised: divide E by the sample's mean absolute error, without gradient.

    Raises:
        ValueError: a number that is not positive, or no predictions.
    """
    _check(beta, bound)
    matching, good = _matching(decisions), optimality(decisions.advantage, bound)
    new, old = matching.prediction, matching.old_prediction
    level = matching.sigma
    positive = _error(beta * new + (1 - beta) * old, matching.target, level, self_normalised)
    negative = _error((1 + beta) * old - beta * new, matching.target, level, self_normalised)
    return _uncut((good * positive + (1 - good) * negative) * bound / beta)


def group_preference(
    decisions: Decisions, *, trust_region: TrustRegion, beta: float = 100.0
) -> Surrogate:
    """Prefer a group's good half to its bad one by the errors themselves (DGPO, arXiv:2510.08425).

    -w A log_prob with one weight per group and draw, w = sigmoid(-beta mean_i A_i (log_prob_i -
    ref_i)), detached: a group whose order the policy has already learned counts little. Draws are
    comparable if the group shares noise and levels.

    Args:
        decisions: see :class:`Decisions`; reads ``ref_log_prob``, ``mask`` and ``group``.
        trust_region: decisions outside it lose their gradient.
        beta: inverse temperature of w.

    Raises:
        ValueError: beta is not positive, or the reference is missing.
    """
    _check(beta)
    log_prob, advantage = decisions.log_prob, decisions.advantage
    if decisions.ref_log_prob is None:
        raise ValueError("a group's preference needs ref_log_prob")
    gained = advantage * (log_prob.detach() - decisions.ref_log_prob)
    weight = torch.sigmoid(-beta * _group_mean(gained, decisions))
    kept = trust_region(decisions.log_ratio.exp(), advantage, decisions.divergence).kept
    effective = torch.where(kept, log_prob, log_prob.detach())
    return Surrogate(-weight * advantage * effective, kept)


def centred_reward(
    decisions: Decisions, *, beta: float = 1.0, bound: float = 5.0, self_normalised: bool = False
) -> Surrogate:
    """Regress the implicit reward on the sample's, both centred in the group (CRD).

    arXiv:2603.14128. The implicit reward rho = E(v_old) - E(v) is how much closer the policy has
    come to the draw's target; the loss is (beta (rho - mean rho) - (r - mean r))^2 bound / beta,
    where r is the sample's optimality and the mean of rho carries no gradient.

    Args:
        decisions: see :class:`Decisions`; reads ``matching``, ``mask`` and ``group``.
        beta: scale of the implicit reward.
        bound: A_max, see :func:`negative_aware`.
        self_normalised: divide each E by its mean absolute error, without gradient.

    Raises:
        ValueError: a number that is not positive, or no predictions.
    """
    _check(beta, bound)
    matching, good = _matching(decisions), optimality(decisions.advantage, bound)
    level = torch.ones_like(matching.sigma)
    error = _error(matching.prediction, matching.target, level, self_normalised)
    implicit = _error(matching.old_prediction, matching.target, level, self_normalised) - error
    centred = implicit - _group_mean(implicit.detach(), decisions)
    wanted = good - _group_mean(good, decisions)
    return _uncut((beta * centred - wanted) ** 2 * bound / beta)


def optimality(advantage: Tensor, bound: float) -> Tensor:
    """clip(A / (2 bound) + 1/2, 0, 1): 1 for the best samples, 1/2 for A = 0."""
    return (advantage / (2 * bound) + 0.5).clamp(0, 1)


def _error(velocity: Tensor, target: Tensor, level: Tensor, self_normalised: bool) -> Tensor:
    """``[B, T]`` mean squared ``level`` (velocity - target), for ``[B, T, ...]`` velocities."""
    gap = level[..., None] * (velocity - target).flatten(2)
    square = (gap**2).mean(dim=2)
    if not self_normalised:
        return square
    return square / gap.detach().abs().mean(dim=2).clamp_min(SMALLEST_ERROR)


def _group_mean(x: Tensor, decisions: Decisions) -> Tensor:
    """``[B, T]``: the mean of ``x [B, T]`` over the group's rows, draw by draw."""
    if decisions.group is None or decisions.mask is None:
        raise ValueError("a mean over the group needs group and mask")
    index, count = group_index(decisions.group)
    mask = decisions.mask.to(x.dtype)
    total = x.new_zeros(count, x.shape[1]).index_add(0, index, x * mask)
    rows = x.new_zeros(count, x.shape[1]).index_add(0, index, mask)
    return (total / rows.clamp_min(1))[index]


def _matching(decisions: Decisions) -> Matching:
    if decisions.matching is None:
        raise ValueError("the objective needs predictions on noised clean samples")
    return decisions.matching


def _check(*positive: float) -> None:
    if min(positive) <= 0:
        raise ValueError(f"beta and bound must be positive; got {', '.join(map(str, positive))}")


def _uncut(loss: Tensor) -> Surrogate:
    return Surrogate(loss, torch.ones_like(loss, dtype=torch.bool))
