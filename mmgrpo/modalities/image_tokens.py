"""Autoregressive image generators: decisions are sampled image codes, and words of a plan."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmgrpo.config.image_layout import read_layout
from mmgrpo.config.token_schema import ImageTokensConfig
from mmgrpo.methods import Method
from mmgrpo.modalities.modality import Modality
from mmgrpo.modalities.tokens import token_policy
from mmgrpo.protocols import Policy, RolloutEngine
from mmgrpo.registry import load_target


def image_token_engine(
    policy: Policy, config: ImageTokensConfig, method: Method, mode: str
) -> RolloutEngine:
    """The engine with the sampling settings of the mode."""
    del method  # fixes only the rollout of flows
    rollout = config.rollout
    by_mode: dict[str, dict[str, Any]] = {
        "train": {
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "min_p": rollout.min_p,
        },
        "eval": {"temperature": config.eval.temperature},
        "greedy": {"temperature": 0.0},
    }
    engine: RolloutEngine = load_target("mmgrpo.rollout.image_tokens:ImageTokenEngine")(
        policy,
        ask_questions=rollout.ask_questions,
        max_answer_tokens=rollout.max_answer_tokens,
        max_rows=config.speed.max_rows,
        **by_mode[mode],
    )
    return engine


def _length(config: ImageTokensConfig) -> int:
    return read_layout(config.model.path).with_plan(config.model.plan_tokens).room


IMAGE_TOKENS = Modality(
    policy=partial(token_policy, "mmgrpo.policies.image_tokens:ImageTokenPolicy", ("plan_tokens",)),
    engine=image_token_engine,
    libraries=("transformers", "diffusers"),
    length_limit=_length,
)
