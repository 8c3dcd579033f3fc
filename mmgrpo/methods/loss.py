"""The update: log-probabilities become a loss, one micro-batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.core import divergence
from mmgrpo.core.aggregation import Denominators, denominators
from mmgrpo.core.matching_objectives import optimality
from mmgrpo.core.objectives import READS_MATCHING, READS_REFERENCE, Decisions, Matching
from mmgrpo.core.ratios import READS_DIVERGENCE, log_ratio
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods.components import with_default
from mmgrpo.methods.options import KlOptions
from mmgrpo.protocols import Evaluation
from mmgrpo.registry import resolve

if TYPE_CHECKING:
    from mmgrpo.methods.method import Method


@dataclass(frozen=True)
class LossOutput:
    """A (micro-batch's share of the) loss.

    Attributes:
        loss: scalar to differentiate; the shares of all micro-batches and ranks sum to the loss.
        metrics: shares that sum to the update's mean, keyed as in ``metrics.jsonl``.
        max_log_ratio: largest absolute log-ratio, for the on-policy check.
    """

    loss: Tensor
    metrics: dict[str, float]
    max_log_ratio: float


def compute_loss(
    method: Method,
    log_prob: Tensor,
    trajectories: Trajectories,
    *,
    evaluation: Evaluation | None = None,
    total: Denominators | None = None,
) -> LossOutput:
    """The loss of prepared trajectories.

    What the tensors hold where the mask is off is never read. Without ``old_log_prob`` the policy
    counts as its own old policy: every ratio is 1.

    Args:
        method: the method.
        log_prob: ``[B, T]`` under the policy being trained, differentiable.
        trajectories: prepared; may be a micro-batch of the update.
        evaluation: the policy's evaluation, where the method reads more than ``log_prob``.
        total: denominators of the whole update; those of ``trajectories`` when None.

    Raises:
        ValueError: something that the method needs is missing.
    """
    if trajectories.advantage is None:
        raise ValueError("trajectories carry no advantage: call method.prepare first")
    mask = trajectories.mask
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    log_prob = _masked(log_prob, mask, dtype)
    old = trajectories.old_log_prob
    old = log_prob.detach() if old is None else _masked(old, mask, dtype)
    per_decision = log_ratio(log_prob, old, mask)
    moved = _from_old(method, evaluation, mask, dtype)
    levelled = _levelled(method, per_decision, trajectories, moved)
    advantage = _masked(trajectories.advantage, mask, dtype)
    surrogate = method.objective(
        Decisions(
            levelled,
            log_prob,
            old,
            advantage,
            moved,
            ref_log_prob=_reference(method, trajectories, dtype),
            matching=_matching(method, trajectories, evaluation),
            mask=mask,
            group=trajectories.group,
            pairs=trajectories.pairs,
            tokens=trajectories.tokens,
        )
    )
    loss = surrogate.loss * _correction(method, old, trajectories)
    penalty, metrics = _regularise(method, log_prob, per_decision, trajectories, evaluation)
    total = denominators(trajectories) if total is None else total
    weight = trajectories.decision_weight.to(dtype)
    aggregate = with_default(method.aggregate, segment=trajectories.segment)
    value = aggregate(loss + penalty, weight, total)
    value = value + _controlled_entropy(method, trajectories, metrics)
    metrics |= {
        **surrogate.metrics,
        "clip_fraction": (~surrogate.kept).to(dtype),
        "ratio/mean": levelled.exp(),
        "policy/approximate_kl": divergence.k3(old, log_prob),
    }
    share = weight / total.decisions
    numbers = {name: (x.detach() * share).sum() for name, x in metrics.items()}
    numbers["loss"] = value.detach()
    numbers["largest"] = per_decision.detach().abs().max() if mask.numel() else value.new_zeros(())
    # One transfer from the device for all of them.
    found = dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
    return LossOutput(loss=value, max_log_ratio=found.pop("largest"), metrics=found)


def _masked(x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` with 0 where the mask is off, so that nothing there reaches loss or gradient."""
    there = mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim()))
    return torch.where(there, x, torch.zeros_like(x)).to(dtype)


def _from_old(
    method: Method, evaluation: Evaluation | None, mask: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """``[B, T]`` divergence from the old policy, where ratio or trust region read it."""
    if not method.reads_divergence:
        return None
    if evaluation is None or evaluation.divergence is None:
        raise ValueError(
            f"method {method.id} needs evaluation.divergence from the old policy: pass "
            "evaluation=policy.evaluate(trajectories, method.request)"
        )
    return _masked(evaluation.divergence, mask, dtype)


def _reference(method: Method, trajectories: Trajectories, dtype: torch.dtype) -> Tensor | None:
    """``[B, T]`` log-probability under the reference, where the objective reads it."""
    if method.component("objective") not in READS_REFERENCE:
        return None
    if trajectories.ref_log_prob is None:
        raise ValueError(f"method {method.id} needs trajectories.ref_log_prob")
    return _masked(trajectories.ref_log_prob, trajectories.mask, dtype)


def _matching(
    method: Method, trajectories: Trajectories, evaluation: Evaluation | None
) -> Matching | None:
    """Predictions, targets and noise levels, where the objective reads them."""
    if method.component("objective") not in READS_MATCHING:
        return None
    found = {
        "evaluation.prediction": None if evaluation is None else evaluation.prediction,
        "trajectories.old_prediction": trajectories.old_prediction,
        "trajectories.target": trajectories.target,
        "trajectories.sigma": trajectories.sigma,
    }
    for name, value in found.items():
        if value is None:
            raise ValueError(f"method {method.id} needs {name}")
    mask = trajectories.mask
    return Matching(
        *(_masked(value, mask, value.dtype) for value in found.values() if value is not None)
    )


def _levelled(
    method: Method, per_decision: Tensor, trajectories: Trajectories, moved: Tensor | None
) -> Tensor:
    """The log-ratio ``[B, T]`` at the method's level."""
    mask = trajectories.mask
    extra: dict[str, Tensor] = {}
    if method.component("ratio") in READS_DIVERGENCE and moved is not None:
        if trajectories.step_std is None:
            raise ValueError(f"method {method.id} needs trajectories.step_std")
        std = _masked(trajectories.step_std, mask, per_decision.dtype)
        extra = {"divergence": moved, "step_std": std}
    levelled: Tensor = method.ratio(per_decision, mask, trajectories.segment, **extra)
    return levelled


def _correction(method: Method, old: Tensor, trajectories: Trajectories) -> Tensor:
    """``[B, T]`` weights for the engine's own probabilities, 1 where it has none."""
    if trajectories.rollout_log_prob is None:
        return torch.ones_like(old)
    mismatch = log_ratio(old, trajectories.rollout_log_prob, trajectories.mask)
    weight: Tensor = method.correction(mismatch, trajectories.mask)
    return weight.to(old.dtype)


def _regularise(
    method: Method,
    log_prob: Tensor,
    log_ratio: Tensor,
    trajectories: Trajectories,
    evaluation: Evaluation | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-decision penalty ``[B, T]`` and the quantities to log."""
    options, mask = method.regulariser, trajectories.mask
    penalty = torch.zeros_like(log_prob)
    metrics: dict[str, Tensor] = {}
    if options.kl.coefficient:
        metrics["kl"] = _kl(method, log_prob, trajectories, evaluation)
        penalty = penalty + _kl_coefficient(options.kl, trajectories) * metrics["kl"]
    if options.ref_velocity:
        metrics["ref_velocity"] = _velocity_gap(method, trajectories, evaluation)
        penalty = penalty + options.ref_velocity * metrics["ref_velocity"]
    if options.drift:
        drift = divergence.drift(log_prob, log_ratio, cap=options.drift_cap)
        penalty = penalty + options.drift * drift
    if evaluation is not None and evaluation.entropy is not None:
        metrics["entropy"] = _masked(evaluation.entropy, mask, log_prob.dtype)
    if options.entropy:
        if "entropy" not in metrics:
            raise ValueError(f"method {method.id} needs evaluation.entropy")
        penalty = penalty - options.entropy * metrics["entropy"]
    return penalty, metrics


def _kl_coefficient(options: KlOptions, trajectories: Trajectories) -> Tensor | float:
    """The KL's coefficient, ``[B, T]`` where it grows with the advantage."""
    if options.floor is None or trajectories.advantage is None:
        return options.coefficient
    advantage = trajectories.advantage
    share = optimality(_masked(advantage, trajectories.mask, advantage.dtype), options.bound)
    return options.floor + (options.coefficient - options.floor) * share


def _velocity_gap(
    method: Method, trajectories: Trajectories, evaluation: Evaluation | None
) -> Tensor:
    """``[B, T]`` squared distance from the reference's velocities."""
    prediction = None if evaluation is None else evaluation.prediction
    if prediction is None or trajectories.ref_prediction is None:
        raise ValueError(
            f"method {method.id} needs evaluation.prediction and trajectories.ref_prediction"
        )
    mask = trajectories.mask
    ref = _masked(trajectories.ref_prediction, mask, prediction.dtype)
    return divergence.squared_gap(_masked(prediction, mask, prediction.dtype), ref)


def _controlled_entropy(
    method: Method, trajectories: Trajectories, metrics: dict[str, Tensor]
) -> Tensor | float:
    """This micro-batch's share of the controlled entropies; the weights hold the denominators."""
    if not method.regulariser.entropy_control.targets or trajectories.entropy_weight is None:
        return 0.0
    if "entropy" not in metrics:
        raise ValueError(f"method {method.id} needs evaluation.entropy")
    entropy = metrics["entropy"]
    weight = _masked(trajectories.entropy_weight, trajectories.mask, entropy.dtype)
    return (weight * entropy).sum()


def _kl(
    method: Method, log_prob: Tensor, trajectories: Trajectories, evaluation: Evaluation | None
) -> Tensor:
    """The KL term ``[B, T]``: the policy's own divergence, or a log-probability estimate."""
    options, mask = method.regulariser.kl, trajectories.mask
    if options.gaussian:
        if evaluation is None or evaluation.divergence is None:
            raise ValueError(
                f"method {method.id} needs evaluation.divergence ('{options.estimator}'): pass "
                "evaluation=policy.evaluate(trajectories, method.request)"
            )
        return _masked(evaluation.divergence, mask, log_prob.dtype)
    other = getattr(trajectories, f"{options.target}_log_prob")
    if other is None:
        raise ValueError(f"method {method.id} needs trajectories.{options.target}_log_prob")
    other = _masked(other, mask, log_prob.dtype)
    value: Tensor = resolve("estimator", options.estimator)(log_prob, other)
    if options.gradient is None:
        return value
    gradient = resolve("estimator", options.gradient)(log_prob, other)
    return divergence.straight_through(value, gradient)
