"""Text and vision-language models: decisions are sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mmgrpo.config.token_schema import ImageTokensConfig, TextConfig, VisionConfig
from mmgrpo.methods import Method
from mmgrpo.modalities.modality import Modality, lora_options
from mmgrpo.protocols import Policy, RolloutEngine
from mmgrpo.registry import load_target
from mmgrpo.trainer.batches import micro_batches

SPEED = ("share_prompts", "pack", "head_tile_rows", "fast_decoding", "fast_layers")
"""Settings of ``speed`` that are the policy's, where the modality has them."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def token_policy(
    target: str,
    own: Sequence[str],
    config: TextConfig | ImageTokensConfig,
    folder: str,
    reference: str,
) -> Policy:
    """Load the policy class ``target``; ``own`` names the model settings that only it has."""
    policy: Policy = load_target(target)(
        folder,
        lora=lora_options(config),
        reference=reference,
        dtype=config.model.dtype,
        gradient_checkpointing=config.model.gradient_checkpointing is True,
        attention=config.model.attention,
        max_prompt_tokens=config.model.max_prompt_tokens,
        seed=config.seed,
        **{name: getattr(config.model, name) for name in own},
        **{name: getattr(config.speed, name) for name in SPEED if hasattr(config.speed, name)},
    )
    return policy


def native_engine(
    policy: Policy, config: TextConfig, mode: str, sampling: dict[str, Any]
) -> RolloutEngine:
    """The policy samples by itself."""
    del mode
    engine: RolloutEngine = load_target("mmgrpo.rollout.autoregressive:AutoregressiveEngine")(
        policy, max_rows=config.speed.max_rows, **sampling
    )
    return engine


def vllm_engine(
    policy: Policy, config: TextConfig, mode: str, sampling: dict[str, Any]
) -> RolloutEngine:
    """A vLLM samples, in this process or behind a URL, with the policy's weights."""
    place = config.rollout.engine
    engine: RolloutEngine = load_target("mmgrpo.rollout.vllm_engine:vllm_engine")(
        policy,
        **vllm_model(config),
        url=place.url,
        folder=place.folder,
        evaluate=mode == "train",
        pieces=partial(
            micro_batches,
            size=config.trainer.micro_batch_size,
            decisions=config.speed.micro_batch_decisions,
        ),
        **sampling,
    )
    return engine


def vllm_model(config: TextConfig) -> dict[str, Any]:
    """What a vLLM for this run loads."""
    return {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "lora_rank": None if config.model.lora is None else config.model.lora.rank,
        "options": config.rollout.engine.options,
    }


ENGINES = {"native": native_engine, "vllm": vllm_engine}


def sampling_of(config: TextConfig | ImageTokensConfig, mode: str) -> dict[str, Any]:
    """The settings of the softmax; only training filters what is drawn."""
    rollout = config.rollout
    by_mode: dict[str, dict[str, Any]] = {
        "train": {name: getattr(rollout, name) for name in SAMPLING},
        "eval": {"temperature": config.eval.temperature},
        "greedy": {"temperature": 0.0},
    }
    return by_mode[mode]


def token_engine(policy: Policy, config: TextConfig, method: Method, mode: str) -> RolloutEngine:
    """The engine with the sampling settings of the mode."""
    del method  # fixes only the rollout of flows
    rollout = config.rollout
    limits = {"max_new_tokens": rollout.max_new_tokens, "stop": tuple(rollout.stop)}
    build = ENGINES[rollout.engine.name]
    return build(policy, config, mode, {**limits, **sampling_of(config, mode)})


def _text_prompts(config: TextConfig) -> dict[str, Any]:
    return {"system_prompt": config.data.system_prompt}


def _vision_prompts(config: VisionConfig) -> dict[str, Any]:
    return {**_text_prompts(config), "image_column": config.data.image_column}  # type: ignore[arg-type]


def _length(config: TextConfig) -> int:
    return config.rollout.max_new_tokens


TEXT = Modality(
    policy=partial(token_policy, "mmgrpo.policies.autoregressive:AutoregressivePolicy", ()),
    engine=token_engine,
    libraries=("transformers",),
    length_limit=_length,
    prompt_options=_text_prompts,
)
VISION = Modality(
    policy=partial(
        token_policy, "mmgrpo.policies.multimodal:VisionLanguagePolicy", ("train_vision",)
    ),
    engine=token_engine,
    libraries=("transformers",),
    length_limit=_length,
    prompt_options=_vision_prompts,
)
