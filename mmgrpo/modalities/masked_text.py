"""Masked diffusion language models: decisions are unmaskings, or random views of a response."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmgrpo.config.token_schema import MaskedTextConfig
from mmgrpo.methods import Method
from mmgrpo.modalities.modality import Modality
from mmgrpo.modalities.tokens import token_policy
from mmgrpo.protocols import Policy, RolloutEngine
from mmgrpo.registry import load_target


def masked_engine(
    policy: Policy, config: MaskedTextConfig, method: Method, mode: str
) -> RolloutEngine:
    """The engine with the settings of the mode; only training asks for the method's decisions."""
    rollout = config.rollout
    by_mode: dict[str, dict[str, Any]] = {
        "train": {
            "temperature": rollout.temperature,
            "order": rollout.order,
            "rule": method.rollout.masked,
        },
        "eval": {"temperature": config.eval.temperature, "order": config.eval.order},
        "greedy": {"temperature": 0.0, "order": rollout.order},
    }
    engine: RolloutEngine = load_target("mmgrpo.rollout.masked_text:MaskedEngine")(
        policy,
        max_new_tokens=rollout.max_new_tokens,
        num_steps=rollout.num_steps,
        block=rollout.block_length,
        **by_mode[mode],
    )
    return engine


MASKED_TEXT = Modality(
    policy=partial(token_policy, "mmgrpo.policies.masked_text:MaskedTextPolicy", ()),
    engine=masked_engine,
    libraries=("transformers",),
    length_limit=lambda config: config.rollout.max_new_tokens,
    prompt_options=lambda config: {"system_prompt": config.data.system_prompt},
)
