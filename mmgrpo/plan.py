"""What a run would do: what it needs and what it would cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmgrpo.config import Config
from mmgrpo.config.image_layout import read_layout
from mmgrpo.config.layer_shape import LayerShape, layer_shape, read_layer_shape
from mmgrpo.config.scale_shape import read_shape
from mmgrpo.errors import (
    ModelError,
)
from mmgrpo.methods import Method
from mmgrpo.policies.adapters import trainable_parameters
from mmgrpo.policies.loading import DTYPES
from mmgrpo.policies.token_logits import TILE_ELEMENTS
from mmgrpo.trainer.activations import (
    Checkpointing,
    MicroBatch,
    available_memory,
    choose_checkpointing,
    training_bytes,
)
from mmgrpo.trainer.batches import micro_batch_bounds

ESTIMATED = frozenset({"text", "vision", "image_tokens"})
"""Modalities whose activations :mod:`mmgrpo.trainer.activations` can estimate."""
FOLDER_KNOWS: dict[str, Callable[[Any], int]] = {
    "image_tokens": lambda model: read_layout(model.path).with_plan(model.plan_tokens).room,
    "image_scales": lambda model: read_shape(model.path).room,
}
"""Modality -> decisions of a sample, where the model's folder says it."""


def describe(config: Config, method: Method, missing: Sequence[str] = ()) -> str:
    """The plan of a run as text: method, work per step, totals, and what is not there yet.

    Args:
        config: the run.
        method: its method.
        missing: what rewards miss, a sentence each.
    """
    lines = [
        f"method      {method.id}: {method.title}",
        f"paper       {method.paper}",
        f"needs       {', '.join(sorted(method.needs)) or 'nothing beside rewards'}",
    ]
    lines += [f"{name:<11} {value}" for name, value in cost(config, method).items()]
    lines.append(f"activations checkpointing {checkpointing(config, method)}")
    absent = [f"{path} (training would refuse to start)" for path in missing_files(config)]
    lines += [f"not found   {what}" for what in (*absent, *missing)]
    return "\n".join(lines)


def cost(config: Config, method: Method) -> dict[str, str]:
    """Upper bounds of the work of a run, by name."""
    rollout, settings = config.rollout, config.trainer
    endings = len(method.rollout.suffix.strides)
    noises = rollout.group_size * rollout.prompts_per_step
    samples, decisions = noises * endings, noises * decisions_per_sample(config, method)
    updates = settings.epochs * settings.minibatches
    rounds = method.sampler.max_rounds if method.sampler.valid_fraction else 1
    return {
        "per step": f"{samples} samples ({rollout.prompts_per_step} prompts x "
        f"{rollout.group_size}"
        + (f" x {endings} granularities" if endings > 1 else "")
        + f"), {_at_most(decisions)}"
        + (f", up to {rounds} rounds of sampling" if rounds > 1 else ""),
        "update": f"{updates} optimiser step(s), {_backwards(config, method)}"
        + (", and a reference pass" if method.reads_reference else ""),
        "total": f"{settings.steps} steps, {settings.steps * samples:,} samples, "
        f"{_at_most(settings.steps * decisions)}, {evaluations(config)} evaluation(s)",
        "weights": weights(config),
    }


def _backwards(config: Config, method: Method) -> str:
    """How many backward passes a step takes at most, and how large they are."""
    settings, budget = config.trainer, config.speed.micro_batch_decisions
    batch, _ = _batch(config, method)
    largest = f"{min(settings.micro_batch_size or batch, batch)} samples"
    width = decisions_per_sample(config, method)
    if budget is not None:
        largest += f" and {max(budget, width):,} decisions"
    if budget is not None and not width:
        return f"backward passes of at most {largest}"
    count = settings.epochs * settings.minibatches * _piece(config, method)[1]
    return f"{count} backward pass(es) of at most {largest}"


def _batch(config: Config, method: Method) -> tuple[int, int]:
    """Samples of a minibatch, and of a group."""
    group = config.rollout.group_size * len(method.rollout.suffix.strides)
    return -(-config.rollout.prompts_per_step // config.trainer.minibatches) * group, group


def _piece(config: Config, method: Method) -> tuple[int, int]:
    """Samples of full length in a micro-batch, and micro-batches in a minibatch, at most."""
    batch, group = _batch(config, method)
    return micro_batch_bounds(
        batch,
        decisions_per_sample(config, method) or 1,
        config.trainer.micro_batch_size,
        decisions=config.speed.micro_batch_decisions,
        group=group if "whole_groups" in method.needs else 1,
    )


def checkpointing(
    config: Any, method: Method, *, policy: Any = None, device: torch.device | None = None
) -> Checkpointing:
    """What ``model.gradient_checkpointing`` comes to, and why.

    Args:
        config: the run.
        method: its method.
        policy: the policy, loaded and with its prompts checked; None: nothing is loaded yet, and
            prompts are taken to be as long as they may be, or as their completions.
        device: where it trains; None: the GPU, if there is one here.
    """
    model = config.model
    if model.gradient_checkpointing != "auto":
        return Checkpointing(model.gradient_checkpointing, "as model.gradient_checkpointing says")
    if not _is_estimated(config):
        return Checkpointing(False, "the activations of this kind of model are not estimated")
    element = DTYPES[model.dtype].itemsize
    loaded = None if policy is None else policy.model.config.to_dict()
    shape = read_layer_shape(model.path) if loaded is None else layer_shape(loaded)
    available = available_memory(
        device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    width = decisions_per_sample(config, method)
    if shape is None or available is None or not width:
        return Checkpointing(False, "the sizes of the model or of the memory are not known here")
    rows, _ = _piece(config, method)
    _, group = _batch(config, method)
    prompts = min(rows, -(-rows // group) + 1)
    longest = (model.max_prompt_tokens or width) if policy is None else policy.longest_prompt
    tile = (config.speed.head_tile_rows or rows * width) * shape.vocabulary
    if config.speed.head_tile_rows is None:
        tile = TILE_ELEMENTS
    found = choose_checkpointing(
        shape,
        MicroBatch(rows, rows * width, prompts, longest),
        logits=min(tile, rows * width * shape.vocabulary),
        element=element,
        shares_prompts=config.speed.share_prompts,
        packed=config.speed.share_prompts and config.speed.pack and _may_pack(policy),
        beside=_beside(config, shape, element, policy),
        available=available,
    )
    if policy is not None or model.max_prompt_tokens:
        return found
    return replace(found, reason=f"{found.reason}; prompts are taken to be as long as completions")


def _may_pack(policy: Any) -> bool:
    """Whether the policy reads packed rows; before it is loaded, whether it might."""
    return policy is None or bool(policy.packs_rows)


def _is_estimated(config: Any) -> bool:
    """Whether the estimate knows everything that the network keeps."""
    return (
        config.modality in ESTIMATED
        and config.model.attention != "eager"  # which keeps the scores of all pairs of tokens
        and not getattr(config.model, "train_vision", False)
    )


def _beside(config: Any, shape: LayerShape, element: int, policy: Any) -> int:
    """Bytes that weights and optimiser will take beside what they have taken already."""
    if policy is not None:
        found = trainable_parameters(policy.network).values()
        return training_bytes(sum(value.numel() for value in found), element)
    return shape.weights * element + training_bytes(
        0 if config.model.lora else shape.weights, element
    )


def decisions_per_sample(config: Config, method: Method) -> int:
    """Tokens, steps or draws of one sample at most; 0 where only the model's folder knows."""
    rollout: Any = config.rollout
    if method.rollout.matching.on:
        return method.rollout.matching.count(rollout.num_steps)
    if config.modality in FOLDER_KNOWS:
        try:
            return FOLDER_KNOWS[config.modality](config.model)
        except ModelError:
            return 0
    return int(getattr(rollout, "max_new_tokens", None) or rollout.num_steps)


def _at_most(decisions: int) -> str:
    return f"at most {decisions:,} decisions" if decisions else "decisions as the model says"


def evaluations(config: Config) -> int:
    """How often the held-out prompts are sampled: before the first step, at times, at the end."""
    if config.data.eval is None:
        return 0
    return 1 + -(-config.trainer.steps // (config.eval.every or config.trainer.steps))


def weights(config: Config) -> str:
    """Size of the model's weight files, where they are on this disk."""
    folder = Path(config.model.path)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    trained = "all weights" if config.model.lora is None else f"LoRA rank {config.model.lora.rank}"
    where = f"{size / 1e6:,.1f} MB in {folder}" if size else f"{config.model.path} (not local)"
    return f"{trained} of {where}, {config.model.dtype}"


def missing_files(config: Config) -> list[str]:
    """Data files of the configuration that do not exist."""
    wanted = [config.data.train, *([config.data.eval] if config.data.eval else [])]
    return [path for path in wanted if not Path(path).exists()]
