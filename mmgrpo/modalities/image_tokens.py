"""Autoregressive image generators: decisions are sampled image codes, and words of a plan."""

from __future__ import annotations

import json
from pathlib import Path

from mmgrpo.config.image_layout import read_layout
from mmgrpo.config.token_schema import ImageTokensConfig
from mmgrpo.methods import Method
from mmgrpo.modalities.modality import Modality
from mmgrpo.modalities.tokens import sampling_of, token_policy
from mmgrpo.protocols import Policy, RolloutEngine
from mmgrpo.registry import load_target

PLAIN = "mmgrpo.policies.image_tokens:ImageTokenPolicy"
FAMILIES = {"janus": "mmgrpo.policies.janus:JanusPolicy"}
"""``model_type`` of models that draw through modules of their own -> their policy."""


def image_token_policy(config: ImageTokensConfig, folder: str, reference: str) -> Policy:
    """Load a language model over image codes, or a model of one of the families."""
    file = Path(folder) / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else ""
    return token_policy(FAMILIES.get(kind, PLAIN), ("plan_tokens",), config, folder, reference)


def image_token_engine(
    policy: Policy, config: ImageTokensConfig, method: Method, mode: str
) -> RolloutEngine:
    """The engine with the sampling settings of the mode."""
    del method  # fixes only the rollout of flows
    rollout = config.rollout
    engine: RolloutEngine = load_target("mmgrpo.rollout.image_tokens:ImageTokenEngine")(
        policy,
        ask_questions=rollout.ask_questions,
        train_answers=rollout.train_answers and mode == "train",
        max_answer_tokens=rollout.max_answer_tokens,
        max_rows=config.speed.max_rows,
        **sampling_of(config, mode),
    )
    return engine


def _length(config: ImageTokensConfig) -> int:
    return read_layout(config.model.path).with_plan(config.model.plan_tokens).room


IMAGE_TOKENS = Modality(
    policy=image_token_policy,
    engine=image_token_engine,
    libraries=("transformers", "diffusers"),
    length_limit=_length,
)
