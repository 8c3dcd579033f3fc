"""Aggregation: the one place where per-decision losses become a number.

Denominators belong to the whole update (all ranks, all micro-batches) and are computed once, so
that any split into micro-batches sums to the same loss and gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.trajectories import Trajectories


@dataclass(frozen=True)
class Denominators:
    """Counts over the whole update.

    Attributes:
        sequences: number of samples with at least one trained decision weight, N.
        decisions: total decision weight, sum_i T_i (a shared decision counts once).
    """

    sequences: float
    decisions: float


def denominators(trajectories: Trajectories, collective: Collective = LOCAL) -> Denominators:
    """Count the samples and decisions of one update over all ranks."""
    weight = trajectories.decision_weight
    counts = torch.stack([(weight.sum(dim=1) > 0).sum().double(), weight.double().sum()])
    sequences, decisions = collective.sum(counts).tolist()
    return Denominators(max(sequences, 1.0), max(decisions, 1e-12))


SUMS_DECISIONS = frozenset({"token_mean"})
"""Aggregations that add up decisions, whatever row they stand in."""


def sequence_mean_token_mean(loss: Tensor, weight: Tensor, total: Denominators) -> Tensor:
    """(1/N) sum_i (1/T_i) sum_t loss: every sample counts the same (GRPO)."""
    length = weight.sum(dim=1)
    per_sequence = (loss * weight).sum(dim=1) / length.clamp_min(1e-12)
    return (per_sequence * (length > 0)).sum() / total.sequences


def token_mean(loss: Tensor, weight: Tensor, total: Denominators) -> Tensor:
    """Sum of the loss / sum_i T_i: every decision counts the same (DAPO)."""
    return (loss * weight).sum() / total.decisions


def sequence_mean_token_sum(loss: Tensor, weight: Tensor, total: Denominators) -> Tensor:
    """(1/N) sum_i sum_t loss."""
    return (loss * weight).sum() / total.sequences


def constant_norm(
    loss: Tensor, weight: Tensor, total: Denominators, *, length: float | None = None
) -> Tensor:
    """(1/(N L)) sum_i sum_t loss with a constant L (Dr. GRPO, arXiv:2503.20783).

    Args:
        loss: ``[B, T]``.
        weight: ``[B, T]``.
        total: counts over the whole update.
        length: L, the rollout's length limit, which must not change from batch to batch; the
            trainer supplies it. None takes the width T of the given tensors.
    """
    length = loss.shape[1] if length is None else length
    return (loss * weight).sum() / (total.sequences * length)
