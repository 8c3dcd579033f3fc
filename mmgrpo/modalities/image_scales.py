"""Next-scale image generators: decisions are the codes of all scales, coarse to fine."""

from __future__ import annotations

from typing import Any

from mmgrpo.config.scale_shape import read_shape
from mmgrpo.config.token_schema import ImageScalesConfig
from mmgrpo.methods import Method
from mmgrpo.modalities.modality import Modality, lora_options
from mmgrpo.protocols import Policy, RolloutEngine
from mmgrpo.registry import load_target


def image_scales_policy(config: ImageScalesConfig, folder: str, reference: str) -> Policy:
    """Load the generator in ``folder``."""
    policy: Policy = load_target("mmgrpo.policies.image_scales:ImageScalesPolicy")(
        folder,
        lora=lora_options(config),
        reference=reference,
        dtype=config.model.dtype,
        gradient_checkpointing=config.model.gradient_checkpointing is True,
        fast_layers=config.speed.fast_layers,
        seed=config.seed,
    )
    return policy


def image_scales_engine(
    policy: Policy, config: ImageScalesConfig, method: Method, mode: str
) -> RolloutEngine:
    """The engine with the temperature of the mode."""
    del method  # fixes only the rollout of flows
    temperature: dict[str, Any] = {
        "train": config.rollout.temperature,
        "eval": config.eval.temperature,
        "greedy": 0.0,
    }
    engine: RolloutEngine = load_target("mmgrpo.rollout.image_scales:ImageScalesEngine")(
        policy, temperature=temperature[mode]
    )
    return engine


IMAGE_SCALES = Modality(
    policy=image_scales_policy,
    engine=image_scales_engine,
    libraries=(),
    length_limit=lambda config: read_shape(config.model.path).room,
)
