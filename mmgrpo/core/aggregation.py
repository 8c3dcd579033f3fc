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
READS_SEGMENTS = frozenset({"sequence_mean_segment_mean"})
"""Aggregations that read the span ids."""


def sequence_mean_token_mean(loss: Tensor, weight: Tensor, total: Denominators) -> Tensor:
    """(1/N) sum_i (1/T_i) sum_t loss: every sample counts the same (GRPO)."""
    length = weight.sum(dim=1)
    per_sequence = (loss * weight).sum(dim=1) / length.clamp_min(1e-12)
    return (per_sequence * (length > 0)).sum() / total.sequences


def token_mean(loss: Tensor, weight: Tensor, total: Denominators) -> Tensor:
    """Sum of the loss / sum_i T_i: every decision counts the same (DAPO)."""
    return (loss * weight).sum() / total.decisions


def sequence_mean_segment_mean(
    loss: Tensor, weight: Tensor, total: Denominators, *, segment: Tensor | None = None
) -> Tensor:
    """(1/N) sum_i (1/K_i) sum_k (1/n_ik) sum_t loss: every segment of a sample counts the same.

    Next-scale generators have a segment per scale, so that the last, which owns most of the codes,
    does not drown the others (arXiv:2601.02256).

    Args:
        loss: ``[B, T]``.
        weight: ``[B, T]``; segments in which it is 0 do not count.
        total: counts over the whole update.
        segment: ``[B, T]`` non-negative span ids, local to the row; the method supplies them.

    Raises:
        ValueError: no segments.
    """
    if segment is None:
        raise ValueError("aggregate sequence_mean_segment_mean needs trajectories.segment")
    blank = loss.new_zeros(len(loss), int(segment.max()) + 1 if segment.numel() else 1)
    count = blank.scatter_add(1, segment, weight.to(loss.dtype))
    mean = blank.scatter_add(1, segment, loss * weight) / count.clamp_min(1e-12)
    per_sequence = mean.sum(dim=1) / (count > 0).sum(dim=1).clamp_min(1)
    return per_sequence.sum() / total.sequences


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
