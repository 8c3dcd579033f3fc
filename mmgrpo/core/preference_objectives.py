"""Preference objectives: losses of pairs (preferred w, rejected l), held to a reference.

A pair's loss stands at the decisions of both its rows. Where each row is in one pair, the mean
over rows is then the mean over pairs, whatever the lengths of the two; a row in several pairs
carries the mean of theirs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmgrpo.core.objectives import Decisions, Surrogate


def preference(
    decisions: Decisions,
    *,
    beta: float = 0.1,
    mean: bool = False,
    label_smoothing: float = 0.0,
    supervised: float = 0.0,
) -> Surrogate:
    """-log sigmoid(beta (s_w - s_l)), s the sample's log-ratio to the reference (DPO, 2305.18290).

    Args:
        decisions: see :class:`~mmgrpo.core.objectives.Decisions`.
        beta: strength of the hold to the reference, inverse nats.
        mean: s is the mean over a sample's decisions, not the sum.
        label_smoothing: probability that a label is wrong, below 1/2 (conservative DPO).
        supervised: weight of minus the preferred sample's own log-probability per token, the mean
            over its decisions (divided by ``tokens`` where these are views of the whole sample).

    Raises:
        ValueError: an option out of its range, or no pairs.
    """
    score = sequence_score(_moved(decisions), _mask(decisions), mean=mean)
    preferred, rejected = _pairs(decisions).unbind(dim=1)
    margin = beta * (score[preferred] - score[rejected])[:, None]
    margin = margin.expand(-1, decisions.log_prob.shape[1])
    valid = torch.ones_like(margin, dtype=torch.bool)
    loss = logistic(margin, label_smoothing)
    if supervised:
        own = sequence_score(decisions.log_prob, _mask(decisions), mean=True)
        own = own if decisions.tokens is None else own / decisions.tokens
        loss = loss - supervised * own[preferred][:, None]
    return _surrogate(loss, margin, decisions, valid=valid)


def step_preference(
    decisions: Decisions,
    *,
    beta: float = 0.1,
    clip: float | None = None,
    label_smoothing: float = 0.0,
) -> Surrogate:
    """-log sigmoid(beta (log rho_w - log rho_l)) at each decision that both samples have.

    On denoising steps this is D3PO (arXiv:2311.13231), rho being the ratio to the reference. On
    (noise, level) draws that the two samples share, where the log-probability is minus the error
    of the denoiser, it is Diffusion-DPO (arXiv:2311.12908) with beta half of the published one.

    Args:
        decisions: see :class:`~mmgrpo.core.objectives.Decisions`.
        beta: strength of the hold to the reference, inverse nats.
        clip: rho is clamped to [1 - clip, 1 + clip]; None: it is not.
        label_smoothing: see :func:`preference`.

    Raises:
        ValueError: an option out of its range, or no pairs.
    """
    moved = _moved(decisions)
    bounded = moved if clip is None else moved.clamp(*_log_bounds(clip))
    preferred, rejected = _pairs(decisions).unbind(dim=1)
    margin = beta * (bounded[preferred] - bounded[rejected])
    return _surrogate(logistic(margin, label_smoothing), margin, decisions, kept=bounded == moved)


def semi_preference(
    decisions: Decisions, *, beta: float = 1000.0, flip: Literal["sign", "drop"] = "sign"
) -> Surrogate:
    """Semi-policy preference: -log sigmoid(beta (m_w - s m_r)) (SePPO, arXiv:2410.05255).

    m is the log-ratio to the reference that drew the sample r. s = 1, as in
    :func:`step_preference`, where the reference is no better on the preferred sample than the
    policy; where it is better, so that its own sample is likely to be good, s = -1. No gradient
    passes through s, which is found for each draw.

    Args:
        decisions: see :class:`~mmgrpo.core.objectives.Decisions`.
        beta: strength of the hold to the reference, inverse nats.
        flip: what a better reference does: ``sign`` s = -1, ``drop`` s = 0.

    Raises:
        ValueError: an option out of its range, or no pairs.
    """
    moved = _moved(decisions)
    preferred, rejected = _pairs(decisions).unbind(dim=1)
    other = {"sign": -1.0, "drop": 0.0}[flip]
    sign = torch.where(moved[preferred].detach() >= 0, moved.new_tensor(1.0), other)
    loss = logistic(beta * (moved[preferred] - sign * moved[rejected]))
    return _surrogate(loss, beta * (moved[preferred] - moved[rejected]), decisions)


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin).

    Raises:
        ValueError: eps is not in [0, 1/2).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {label_smoothing}.")
    loss = -logsigmoid(margin)
    return loss + label_smoothing * margin if label_smoothing else loss


def sequence_score(moved: Tensor, mask: Tensor, *, mean: bool = False) -> Tensor:
    """``[B]`` sum or mean of ``moved [B, T]`` over the decisions of each sample."""
    total = (moved * mask).sum(dim=1)
    return total / mask.sum(dim=1).clamp_min(1) if mean else total


def spread(loss: Tensor, valid: Tensor, pairs: Tensor, size: int) -> Tensor:
    """Put losses of pairs at the decisions of their rows.

    Args:
        loss: ``[N, T]``, or another value of pairs.
        valid: ``[N, T]`` bool, what counts.
        pairs: ``[N, 2]`` rows.
        size: number of rows B.

    Returns:
        ``[B, T]``: the mean over the row's pairs that count there, 0 where none does.
    """
    weight = valid.to(loss.dtype)
    total = loss.new_zeros(size, loss.shape[1])
    count = torch.zeros_like(total)
    for rows in pairs.unbind(dim=1):
        total = total.index_add(0, rows, loss * weight)
        count = count.index_add(0, rows, weight)
    return total / count.clamp_min(1)


def _surrogate(
    loss: Tensor,
    margin: Tensor,
    decisions: Decisions,
    *,
    valid: Tensor | None = None,
    kept: Tensor | None = None,
) -> Surrogate:
    """Spread losses and margins ``[N, T]`` of pairs over their rows.

    They count where ``valid [N, T]`` says, by default where both samples have a decision. An equal
    margin counts as half right.
    """
    mask, pairs = _mask(decisions), _pairs(decisions)
    valid = mask[pairs].all(dim=1) if valid is None else valid
    right = (margin.detach().sign() + 1) / 2
    return Surrogate(
        spread(loss, valid, pairs, len(mask)),
        torch.ones_like(mask) if kept is None else kept,
        {
            "preference/margin": spread(margin.detach(), valid, pairs, len(mask)),
            "preference/accuracy": spread(right, valid, pairs, len(mask)),
        },
    )


def _moved(decisions: Decisions) -> Tensor:
    """``[B, T]`` log-ratio to the reference, differentiable."""
    if decisions.ref_log_prob is None:
        raise ValueError("a preference loss needs the reference's log-probabilities")
    return decisions.log_prob - decisions.ref_log_prob


def _pairs(decisions: Decisions) -> Tensor:
    if decisions.pairs is None:
        raise ValueError("a preference loss needs trajectories.pairs: call method.prepare first")
    return decisions.pairs


def _mask(decisions: Decisions) -> Tensor:
    mask = decisions.mask
    return torch.ones_like(decisions.log_prob, dtype=torch.bool) if mask is None else mask


def _log_bounds(clip: float) -> tuple[float, float]:
    if not 0 < clip < 1:
        raise ValueError(f"clip must be in (0, 1); got {clip}.")
    return math.log1p(-clip), math.log1p(clip)
