"""``train --dry-run``: what a run would do and cost, without loading weights or writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmgrpo.config import Config
from mmgrpo.methods import Method


def describe(config: Config, method: Method) -> str:
    """The plan of a run as text: method, work per step, totals, and files that are not there."""
    lines = [
        f"method      {method.id}: {method.title}",
        f"paper       {method.paper}",
        f"needs       {', '.join(sorted(method.needs)) or 'nothing beside rewards'}",
    ]
    lines += [f"{name:<11} {value}" for name, value in cost(config, method).items()]
    missing = missing_files(config)
    lines += [f"not found   {path} (training would refuse to start)" for path in missing]
    return "\n".join(lines)


def cost(config: Config, method: Method) -> dict[str, str]:
    """Upper bounds of the work of a run, by name."""
    rollout, settings = config.rollout, config.trainer
    samples = rollout.group_size * rollout.prompts_per_step
    decisions = samples * decisions_per_sample(config)
    updates = settings.epochs * settings.minibatches
    micro = settings.micro_batch_size or samples // settings.minibatches or 1
    backwards = settings.epochs * -(-samples // micro)
    rounds = method.sampler.max_rounds if method.sampler.valid_fraction else 1
    evaluations = 0
    if config.data.eval is not None:
        evaluations = 2 if config.eval.every is None else 1 + -(-settings.steps // config.eval.every)
    return {
        "per step": f"{samples} samples ({rollout.prompts_per_step} prompts x "
        f"{rollout.group_size}), at most {decisions:,} decisions"
        + (f", up to {rounds} rounds of sampling" if rounds > 1 else ""),
        "update": f"{updates} optimiser step(s), {backwards} backward pass(es) of at most "
        f"{micro} samples" + (", and a reference pass" if _reference(method) else ""),
        "total": f"{settings.steps} steps, {settings.steps * samples:,} samples, at most "
        f"{settings.steps * decisions:,} decisions, {evaluations} evaluation(s)",
        "weights": weights(config),
    }


def decisions_per_sample(config: Config) -> int:
    """Tokens, or denoising steps, of one sample at most."""
    rollout: Any = config.rollout
    return int(getattr(rollout, "max_new_tokens", None) or rollout.num_steps)


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


def _reference(method: Method) -> bool:
    return bool(method.needs & {"ref_log_prob", "ref_prediction"})
