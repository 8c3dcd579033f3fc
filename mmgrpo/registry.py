"""Where every part that is chosen by name lives: visible tables of lazy ``"module:name"`` targets.

Nothing is imported until it is asked for, so a table may name a part that needs an optional
dependency. To add a part, write it and add its line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mmgrpo.errors import UsageError, nearest

_CORE = "mmgrpo.core."

COMPONENTS: dict[str, dict[str, str]] = {
    "combine": {
        "sum_then_normalise": _CORE + "multi_reward:sum_then_normalise",
        "normalise_then_sum": _CORE + "multi_reward:normalise_then_sum",
        "gdpo": _CORE + "multi_reward:gdpo",
    },
    "shaping": {
        "clip": _CORE + "shaping:clip",
        "scale": _CORE + "shaping:scale",
        "rank_graph": _CORE + "ranking:rank_graph",
        "win_rate": _CORE + "shaping:win_rate",
    },
    "filter": {
        "uniform_groups": _CORE + "filters:uniform_groups",
        "truncated": _CORE + "filters:truncated",
        "zero_advantage": _CORE + "filters:zero_advantage",
        "prune_leaves": _CORE + "filters:prune_leaves",
        "prune_steps": _CORE + "filters:prune_steps",
        "best_and_worst": _CORE + "filters:best_and_worst",
    },
    "baseline": {
        "none": _CORE + "advantages:no_baseline",
        "group": _CORE + "advantages:group_baseline",
        "leave_one_out": _CORE + "advantages:leave_one_out_baseline",
        "length_weighted": _CORE + "advantages:length_weighted_baseline",
        "greedy": _CORE + "advantages:greedy_baseline",
        "history": _CORE + "advantages:history_baseline",
        "stratum": _CORE + "strata:stratum_baseline",
    },
    "scale": {
        "none": _CORE + "advantages:no_scale",
        "group": _CORE + "advantages:group_scale",
        "batch": _CORE + "advantages:batch_scale",
        "batch_centred": _CORE + "advantages:batch_centred_scale",
        "mean": _CORE + "advantages:mean_scale",
        "history": _CORE + "advantages:history_scale",
        "stratum": _CORE + "strata:stratum_scale",
    },
    "credit": {
        "uniform": _CORE + "credit:uniform",
        "reward_to_go": _CORE + "credit:reward_to_go",
        "depthwise": _CORE + "credit:depthwise",
        "node_sum": _CORE + "credit:node_sum",
        "step_std": _CORE + "credit:step_std",
        "inverse_step_length": _CORE + "credit:inverse_step_length",
    },
    "ratio": {
        "token": _CORE + "ratios:token",
        "segment": _CORE + "ratios:segment",
        "sequence": _CORE + "ratios:sequence",
        "guard": _CORE + "ratios:guard",
    },
    "trust_region": {
        "none": _CORE + "trust_regions:unclipped",
        "ppo_clip": _CORE + "trust_regions:ppo_clip",
        "divergence_mask": _CORE + "trust_regions:divergence_mask",
    },
    "objective": {
        "policy_gradient": _CORE + "objectives:policy_gradient",
        "reinforce": _CORE + "objectives:reinforce",
        "score_entropy": _CORE + "score_entropy:score_entropy",
        "log_policy_gradient": _CORE + "objectives:log_policy_gradient",
        "weighted_policy_gradient": _CORE + "objectives:weighted_policy_gradient",
        "preference": _CORE + "preference_objectives:preference",
        "step_preference": _CORE + "preference_objectives:step_preference",
        "semi_preference": _CORE + "preference_objectives:semi_preference",
        "negative_aware": _CORE + "matching_objectives:negative_aware",
        "group_preference": _CORE + "matching_objectives:group_preference",
        "centred_reward": _CORE + "matching_objectives:centred_reward",
    },
    "aggregate": {
        "sequence_mean_token_mean": _CORE + "aggregation:sequence_mean_token_mean",
        "token_mean": _CORE + "aggregation:token_mean",
        "sequence_mean_token_sum": _CORE + "aggregation:sequence_mean_token_sum",
        "constant_norm": _CORE + "aggregation:constant_norm",
        "sequence_mean_segment_mean": _CORE + "aggregation:sequence_mean_segment_mean",
    },
    "correction": {
        "none": _CORE + "corrections:none",
        "truncated": _CORE + "corrections:truncated",
        "masked": _CORE + "corrections:masked",
        "geometric_rejection": _CORE + "corrections:geometric_rejection",
    },
    "pairs": {
        "none": _CORE + "pairs:none",
        "given": _CORE + "pairs:given",
        "best_worst": _CORE + "pairs:best_worst",
        "top_bottom": _CORE + "pairs:top_bottom",
        "dominance": _CORE + "pairs:dominance",
    },
    "estimator": {
        "k1": _CORE + "divergence:k1",
        "k2": _CORE + "divergence:k2",
        "k3": _CORE + "divergence:k3",
    },
}
"""Method components: slot -> name -> target."""

_EXTERNAL = "mmgrpo.tracking.external:"

TRACKERS: dict[str, str] = {
    "tensorboard": _EXTERNAL + "tensorboard",
    "trackio": _EXTERNAL + "trackio",
    "wandb": _EXTERNAL + "wandb",
}
"""Trackers: name -> target."""

MODALITIES: dict[str, str] = {
    "text": "mmgrpo.modalities.tokens:TEXT",
    "vision": "mmgrpo.modalities.tokens:VISION",
    "image": "mmgrpo.modalities.flow:IMAGE",
    "video": "mmgrpo.modalities.flow:VIDEO",
    "image_tokens": "mmgrpo.modalities.image_tokens:IMAGE_TOKENS",
    "masked_text": "mmgrpo.modalities.masked_text:MASKED_TEXT",
    "image_scales": "mmgrpo.modalities.image_scales:IMAGE_SCALES",
}
"""Modalities: name -> target. The configuration's schema has a class for each."""

KINDS: Mapping[str, Mapping[str, str]] = {"tracker": TRACKERS, "modality": MODALITIES}


def load_target(target: str) -> Any:
    """Import ``"module:name"`` and return the object it names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def names(kind: str) -> list[str]:
    """Sorted names of a kind: a component slot or a key of ``KINDS``."""
    return sorted(_table(kind))


def resolve(kind: str, name: str) -> Any:
    """Return the registered object.

    Raises:
        UsageError: the kind has no such name; the message ends with the nearest one.
    """
    table = _table(kind)
    if name not in table:
        raise UsageError(f"unknown {kind} '{name}'{nearest(name, table)}")
    return load_target(table[name])


def _table(kind: str) -> Mapping[str, str]:
    return COMPONENTS[kind] if kind in COMPONENTS else KINDS[kind]
