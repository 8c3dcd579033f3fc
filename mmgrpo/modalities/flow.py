"""Flow and diffusion models of images and videos: decisions are stochastic denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mmgrpo.config.flow_schema import ImageConfig, VideoConfig
from mmgrpo.errors import ModelError
from mmgrpo.methods import Method
from mmgrpo.modalities.modality import Modality, lora_options
from mmgrpo.modalities.sources import training_engine
from mmgrpo.protocols import Policy, RolloutEngine
from mmgrpo.registry import load_target

FlowConfig = ImageConfig | VideoConfig


def flow_policy(own: Sequence[str], config: FlowConfig, folder: str, reference: str) -> Policy:
    """Load a diffusers pipeline; ``own`` names the rollout settings that only the modality has.

    Raises:
        ModelError: the pipeline is of another modality.
    """
    policy: Policy = load_target("mmgrpo.policies.flow:FlowPolicy")(
        folder,
        lora=lora_options(config),
        reference=reference,
        dtype=config.model.dtype,
        gradient_checkpointing=config.model.gradient_checkpointing is True,
        guidance_scale=config.rollout.guidance_scale,
        max_prompt_tokens=config.model.max_prompt_tokens,
        fast_layers=config.speed.fast_layers,
        seed=config.seed,
        **{name: getattr(config.rollout, name) for name in own},
    )
    if policy.modality != config.modality:
        raise ModelError(
            f"{folder} draws {policy.modality}s, and the run's modality is '{config.modality}'; "
            f"expected modality '{policy.modality}'."
        )
    return policy


def flow_engine(
    own: Sequence[str], policy: Policy, config: FlowConfig, method: Method, mode: str
) -> RolloutEngine:
    """The engine with the method's sampler; evaluation and greedy samples follow the ODE."""
    rollout, fixed = config.rollout, method.rollout
    by_mode: dict[str, dict[str, Any]] = {
        "train": {
            "kernel": fixed.kernel,
            "eta": fixed.eta,
            "selection": dict(fixed.selection),
            "shared_noise": fixed.shared_noise,
            "tree": fixed.tree,
            "suffix": fixed.suffix,
            "matching": fixed.matching,
            "noise_growth": fixed.noise_growth,
            "num_steps": rollout.num_steps,
            "keep_velocity": "old_prediction" in method.needs
            and fixed.old.samples
            and not fixed.matching.on,
        },
        "eval": {
            "kernel": "ode",
            "num_steps": config.eval.num_steps or rollout.num_steps,
            "guidance_scale": config.eval.guidance_scale,
        },
        "greedy": {"kernel": "ode", "num_steps": rollout.num_steps},
    }
    engine: RolloutEngine = load_target("mmgrpo.rollout.flow:FlowEngine")(
        policy,
        height=rollout.height,
        width=rollout.width,
        shift=rollout.shift,
        **{name: getattr(rollout, name) for name in own},
        **by_mode[mode],
    )
    return training_engine(engine, policy, config, method) if mode == "train" else engine


IMAGE = Modality(
    policy=partial(flow_policy, ()),
    engine=partial(flow_engine, ()),
    libraries=("transformers", "diffusers"),
    length_limit=lambda config: config.rollout.num_steps - 1,
    prompt_options=lambda config: {"image_column": config.data.image_column},
)
VIDEO = replace(
    IMAGE,
    policy=partial(flow_policy, ("negative_prompt",)),
    engine=partial(flow_engine, ("num_frames",)),
    prompt_options=lambda config: {"image_column": None},
)
