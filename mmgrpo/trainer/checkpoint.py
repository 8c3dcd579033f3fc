"""Checkpoints: complete, atomic, without pickle.

``checkpoints/step_NNNNNN/`` holds ``state.json`` (where the run stands, its configuration, random
states as numbers), ``state.safetensors`` (weights, optimiser, shadows, random states) and ``hf/``,
which ``from_pretrained`` or PEFT loads. The folder appears under its name only when complete.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmgrpo.config.compare import first_difference
from mmgrpo.errors import UsageError
from mmgrpo.trainer.parts import Parts, State

PREFIX = "step_"

def checkpoint_path(run_dir: Path, step: int) -> Path:
    """``run_dir/checkpoints/step_NNNNNN``."""
    return run_dir / "checkpoints" / f"{PREFIX}{step:06d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted(run_dir.glob(f"checkpoints/{PREFIX}*/state.json"))
    return found[-1].parent if found else None


def save_checkpoint(
    run_dir: Path, parts: Parts, state: State, config: dict[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of the current step; keep the newest ``keep``. Call on every rank."""
    target = checkpoint_path(run_dir, state.step)
    temporary = target.with_name(f".{target.name}.partial")
    accelerator = parts.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    rank_file = temporary / f"random_{parts.collective.rank}.safetensors"
    numbers, tensors = random_state()
    save_file(tensors, rank_file)
    rank_file.with_suffix(".json").write_text(json.dumps(numbers))
    if accelerator.is_main_process:
        save_file(_tensors(parts), temporary / "state.safetensors")
        parts.policy.export(temporary / "hf")
        document = {"format": 1, "state": asdict(state), "config": config}
        (temporary / "state.json").write_text(json.dumps(document, indent=1))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(target.parent)
        for old in sorted(run_dir.glob(f"checkpoints/{PREFIX}*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(path: Path, parts: Parts, config: dict[str, Any]) -> State:
    """Restore weights, optimiser, shadows and random states in place; return where it stood.

    Raises:
        UsageError: the checkpoint belongs to another configuration; names the first difference.
    """
    document = read_state(path)
    check_same_config(document["config"], config, path)
    tensors = load_file(path / "state.safetensors")
    _restore(parts, tensors)
    rank_file = path / f"random_{parts.collective.rank}.safetensors"
    if rank_file.is_file():
        numbers = json.loads(rank_file.with_suffix(".json").read_text())
        set_random_state(numbers, load_file(rank_file))
    return State(**document["state"])


def read_state(path: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint folder, or raise :class:`UsageError`."""
    file = path / "state.json"
    if not file.is_file():
        raise UsageError(f"{path} is not a checkpoint: it holds no state.json.")
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def check_same_config(saved: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    """Raise :class:`UsageError` if the two differ in a key that shapes the training."""
    difference = first_difference(saved, given)
    if difference:
        raise UsageError(
            f"{path} belongs to another configuration: {difference}; use the same value, or "
            "another run_dir."
        )


def _named_parameters(parts: Parts) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in parts.policy.network.named_parameters() if p.requires_grad}


def _tensors(parts: Parts) -> dict[str, Tensor]:
    """Every tensor of the run's state under one flat name each, without shared memory."""
    named = _named_parameters(parts)
    tensors = {f"weights/{name}": p.detach() for name, p in named.items()}
    optimizer = parts.optimizer.state
    for name, parameter in named.items():
        for key, value in optimizer.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    for shadow_name, shadow in parts.second_weights.items():
        for name, value in shadow.state_dict().items():
            tensors[f"{shadow_name}/{name}"] = value
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _restore(parts: Parts, tensors: dict[str, Tensor]) -> None:
    named = _named_parameters(parts)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weights/{name}"])
    optimizer = parts.optimizer
    for name, parameter in named.items():
        state: dict[str, Tensor] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"optimizer/{key}/{name}")
            if value is not None:
                state[key] = value.clone() if key == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    for shadow_name, shadow in parts.second_weights.items():
        prefix = f"{shadow_name}/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        shadow.load_state_dict(own)


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State of every global random generator, as JSON numbers and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    numbers = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    tensors = {"torch": torch.get_rng_state()}
    for i, value in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"cuda_{i}"] = value
    return numbers, tensors


def set_random_state(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`random_state`."""
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[k] for k in sorted(tensors) if k.startswith("cuda_")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
