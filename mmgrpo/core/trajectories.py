"""The one batch type: B sampled trajectories of up to T decisions each.

A decision is a token, a stochastic denoising step or an unmasking. Rows that share ``node`` ids
share decisions (a tree); optional fields are None unless the method asks for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Payload(Protocol):
    """What a policy needs to evaluate the decisions again; opaque to the core."""

    def select(self, rows: Tensor) -> Self:
        """Return the given rows (int64 indices)."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        ...

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join payloads row-wise."""
        ...


@dataclass(frozen=True)
class Trajectories:
    """B samples by T decisions. All tensors share one device; ``[B, T]`` floats are float32.

    Attributes:
        group: ``[B]`` int64 id of the prompt group; groups may have different sizes.
        mask: ``[B, T]`` bool, decisions that the policy sampled and that are trained.
        old_log_prob: ``[B, T]`` log-probability under the policy that sampled (nats).
        rollout_log_prob: ``[B, T]`` the engine's own number where it differs from ``old_log_prob``.
        ref_log_prob: ``[B, T]`` log-probability under the reference.
        entropy: ``[B, T]`` entropy of the decision's distribution when it was sampled (nats).
        values: ``[B, T]`` a critic's values.
        rewards: name -> ``[B]``; NaN means that the reward does not apply to the sample.
        reward: ``[B]`` the combined, shaped reward.
        step_reward: ``[B, T]`` rewards given to single decisions.
        baseline_reward: ``[B]`` reward of the group's greedy sample.
        history_mean, history_std: ``[B]`` of the last rewards of the sample's prompt; NaN where
            there were too few.
        advantage: ``[B, T]``, constants.
        weight: ``[B, T]`` how much a decision counts (1 / multiplicity for shared nodes).
        step_std: ``[B, T]`` standard deviation of a denoising step's Gaussian.
        entropy_weight: ``[B, T]`` what the decision's entropy is multiplied by in the loss.
        step_length: ``[B, T]`` how far the noise level falls in a denoising step, -dt.
        segment: ``[B, T]`` int64 span ids within the row (sentence, turn, tree depth).
        node: ``[B, T]`` int64 decision ids; equal ids are one and the same decision.
        stratum, variant: ``[B]`` int64 sub-groups.
        version: ``[B]`` int64 version of the weights that sampled.
        truncated: ``[B]`` bool, the sample was cut off by the length limit.
        tokens: ``[B]`` tokens of the sample, where its decisions are not tokens but views of them.
        pairs: ``[N, 2]`` int64 rows (preferred, rejected).
        old_prediction, ref_prediction: ``[B, T, ...]`` parameters of the decision's distribution
            (a velocity for flow policies) under the sampling and the reference weights.
        best_prediction: ``[B, T, ...]`` ``old_prediction`` of the group's best sample.
        target: ``[B, T, ...]`` velocity that leads to the clean sample, where a decision is a
            (noise, level) draw on it.
        sigma: ``[B, T]`` noise level of such a draw.
        payload: see :class:`Payload`.
    """

    group: Tensor
    mask: Tensor
    old_log_prob: Tensor | None = None
    rollout_log_prob: Tensor | None = None
    ref_log_prob: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    rewards: dict[str, Tensor] = field(default_factory=dict)
    reward: Tensor | None = None
    step_reward: Tensor | None = None
    baseline_reward: Tensor | None = None
    history_mean: Tensor | None = None
    history_std: Tensor | None = None
    advantage: Tensor | None = None
    weight: Tensor | None = None
    step_std: Tensor | None = None
    step_length: Tensor | None = None
    entropy_weight: Tensor | None = None
    segment: Tensor | None = None
    node: Tensor | None = None
    stratum: Tensor | None = None
    variant: Tensor | None = None
    version: Tensor | None = None
    truncated: Tensor | None = None
    tokens: Tensor | None = None
    pairs: Tensor | None = None
    old_prediction: Tensor | None = None
    ref_prediction: Tensor | None = None
    best_prediction: Tensor | None = None
    target: Tensor | None = None
    sigma: Tensor | None = None
    payload: Any = None

    def __post_init__(self) -> None:
        if self.mask.dim() != 2 or self.group.shape != self.mask.shape[:1]:
            raise ValueError(
                f"mask must be [B, T] and group [B]; got {tuple(self.mask.shape)} "
                f"and {tuple(self.group.shape)}"
            )
        if self.mask.dtype != torch.bool:
            object.__setattr__(self, "mask", self.mask.bool())
        for name in _PER_DECISION:
            value = getattr(self, name)
            if value is not None and value.shape[:2] != self.mask.shape:
                raise ValueError(
                    f"{name} must start with [B, T] = {tuple(self.mask.shape)}; "
                    f"got {tuple(value.shape)}"
                )
        for name, value in {**self.rewards, **_present(self, _PER_SAMPLE)}.items():
            if value.shape != self.group.shape:
                raise ValueError(
                    f"{name} must be [B] = {tuple(self.group.shape)}; got {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return self.group.shape[0]

    @property
    def decision_weight(self) -> Tensor:
        """``[B, T]`` float: ``weight`` where given, else 1 for every masked-in decision."""
        weight = self.mask.float() if self.weight is None else self.weight
        return weight * self.mask

    @property
    def lengths(self) -> Tensor:
        """``[B]`` number of masked-in decisions per sample."""
        return self.mask.sum(dim=1)

    def replace(self, **changes: Any) -> Trajectories:
        """Return a copy with the given fields changed."""
        return replace(self, **changes)

    def select(self, rows: Tensor) -> Trajectories:
        """Return the given rows, ``rows`` being int64 indices or a ``[B]`` bool mask.

        Pairs are kept where both rows are kept, and renumbered.
        """
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        changes: dict[str, Any] = {
            name: value[rows] for name, value in _present(self, _PER_ROW).items()
        }
        changes["rewards"] = {name: value[rows] for name, value in self.rewards.items()}
        if self.pairs is not None:
            position = torch.full((len(self),), -1, dtype=torch.int64, device=rows.device)
            position[rows] = torch.arange(len(rows), device=rows.device)
            pairs = position[self.pairs]
            changes["pairs"] = pairs[(pairs >= 0).all(dim=1)]
        if self.payload is not None:
            changes["payload"] = self.payload.select(rows)
        return replace(self, **changes)

    def to(self, device: torch.device) -> Trajectories:
        """Return a copy on ``device``."""
        changes: dict[str, Any] = {
            name: value.to(device) for name, value in _present(self, _TENSORS).items()
        }
        changes["rewards"] = {name: value.to(device) for name, value in self.rewards.items()}
        if self.payload is not None:
            changes["payload"] = self.payload.to(device)
        return replace(self, **changes)

    @staticmethod
    def cat(parts: Sequence[Trajectories]) -> Trajectories:
        """Join rollouts that carry the same fields; shorter ones are padded on the right.

        Raises:
            ValueError: a field is there in one rollout and not in another.
        """
        if len(parts) == 1:
            return parts[0]
        carried = [{*_present(part, _TENSORS), *part.rewards} for part in parts]
        uneven = carried[0].union(*carried) - carried[0].intersection(*carried)
        if uneven:
            raise ValueError(f"only some of the rollouts to join carry {', '.join(sorted(uneven))}")
        width = max(part.mask.shape[1] for part in parts)
        first = parts[0]
        changes: dict[str, Any] = {}
        for name in _present(first, _PER_ROW):
            values = [getattr(part, name) for part in parts]
            if name in ("mask", *_PER_DECISION):
                values = [_pad_decisions(value, width) for value in values]
            changes[name] = torch.cat(values)
        changes["rewards"] = {
            name: torch.cat([part.rewards[name] for part in parts]) for name in first.rewards
        }
        if first.pairs is not None:
            starts = itertools.accumulate(map(len, parts), initial=0)
            changes["pairs"] = torch.cat(
                [
                    part.pairs + start
                    for part, start in zip(parts, starts, strict=False)
                    if part.pairs is not None
                ]
            )
        if first.payload is not None:
            changes["payload"] = type(first.payload).cat([part.payload for part in parts])
        return replace(first, **changes)


_PER_DECISION = (
    "old_log_prob", "rollout_log_prob", "ref_log_prob", "entropy", "values", "step_reward",
    "advantage", "weight", "step_std", "step_length", "entropy_weight", "segment", "node",
    "old_prediction",
    "ref_prediction", "best_prediction", "target", "sigma",
)  # fmt: skip
_PER_SAMPLE = (
    "reward", "baseline_reward", "history_mean", "history_std", "stratum", "variant", "version",
    "truncated", "tokens",
)  # fmt: skip
_PER_ROW = ("group", "mask", *_PER_DECISION, *_PER_SAMPLE)
_TENSORS = tuple(f.name for f in fields(Trajectories) if f.name not in ("rewards", "payload"))


def _present(trajectories: Trajectories, names: Sequence[str]) -> dict[str, Tensor]:
    """The fields that are not None."""
    values = {name: getattr(trajectories, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _pad_decisions(value: Tensor, width: int) -> Tensor:
    missing = width - value.shape[1]
    if missing == 0:
        return value
    return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)
