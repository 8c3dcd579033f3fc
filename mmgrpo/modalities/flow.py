"""Flow and diffusion image models: decisions are stochastic denoising steps."""

from __future__ import annotations

from typing import Any

from mmgrpo.config.flow_schema import ImageConfig
from mmgrpo.methods import Method
from mmgrpo.modalities.modality import Modality, lora_options
from mmgrpo.protocols import Policy, RolloutEngine
from mmgrpo.registry import load_target


def flow_policy(config: ImageConfig, folder: str, reference: str) -> Policy:
    """Load a diffusers pipeline."""
    policy: Policy = load_target("mmgrpo.policies.flow:FlowPolicy")(
        folder,
        lora=lora_options(config),
        reference=reference,
        dtype=config.model.dtype,
        gradient_checkpointing=config.model.gradient_checkpointing,
        guidance_scale=config.rollout.guidance_scale,
        max_prompt_tokens=config.model.max_prompt_tokens,
        seed=config.seed,
    )
    return policy


def flow_engine(policy: Policy, config: ImageConfig, method: Method, mode: str) -> RolloutEngine:
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
            "num_steps": rollout.num_steps,
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
        **by_mode[mode],
    )
    return engine


IMAGE = Modality(
    policy=flow_policy,
    engine=flow_engine,
    libraries=("transformers", "diffusers"),
    length_limit=lambda config: config.rollout.num_steps - 1,
)
