"""Checkpoints: complete, atomic, without pickle.

``checkpoints/step_NNNNNN/`` holds ``state.json`` (where the run stands, and its configuration),
``state.safetensors`` (weights, optimiser, reference, average), ``random_R.json`` (the global random
generators of rank R) and ``hf/``, which ``from_pretrained`` or PEFT loads. The folder appears under
its name when it is complete, and never changes after.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmgrpo.errors import MmgrpoError
from mmgrpo.trainer.parts import Parts, State
from mmgrpo.trainer.randomness import random_state, set_random_state
from mmgrpo.trainer.run_folder import checkpoints, read_state


def save_checkpoint(
    run_dir: Path, parts: Parts, state: State, config: dict[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of the current step; keep the newest ``keep``. Call on every rank.

    Raises:
        MmgrpoError: it could not be written; earlier checkpoints are as they were.
    """
    target = run_dir / "checkpoints" / f"step_{state.step:06d}"
    partial = _partial(target)
    accelerator = parts.accelerator
    if (target / "state.json").is_file():
        return target
    if accelerator.is_main_process:
        _remove_partial(target.parent)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        _write_json(partial / f"random_{parts.collective.rank}.json", random_state())
        if accelerator.is_main_process:
            _write(partial, parts, state, config)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _sync(partial)
            partial.replace(target)
            _flush(target.parent)
    except (OSError, SafetensorError) as error:
        _remove_partial(target.parent)
        raise MmgrpoError(
            f"the checkpoint {target} could not be written: {error}; earlier ones are intact."
        ) from error
    if accelerator.is_main_process:
        for old in checkpoints(run_dir)[:-keep]:
            old.rename(_partial(old))  # at no moment is an incomplete folder a checkpoint
        _remove_partial(target.parent)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(path: Path, parts: Parts) -> State:
    """Restore weights, optimiser, shadows and random states in place; return where it stood."""
    tensors = load_file(path / "state.safetensors")
    for part, holder in _holders(parts).items():
        prefix = f"{part}/"
        holder.load_state_dict(
            {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
        )
    random_file = path / f"random_{parts.collective.rank}.json"
    if random_file.is_file():  # absent for a rank that the run did not have then
        set_random_state(json.loads(random_file.read_text()))
    return State(**read_state(path)["state"])


def _holders(parts: Parts) -> dict[str, Any]:
    """Everything with tensors that move, or that nothing else could bring back."""
    history = {} if parts.history is None else {"history": parts.history}
    control = {} if parts.entropy_control is None else {"entropy_control": parts.entropy_control}
    return {"optimizer": parts.optimizer, **parts.second_weights, **history, **control}


def _write(folder: Path, parts: Parts, state: State, config: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {
        f"{part}/{name}": value.detach().cpu().clone().contiguous()  # safetensors shares no memory
        for part, holder in _holders(parts).items()
        for name, value in holder.state_dict().items()
    }
    save_file(tensors, folder / "state.safetensors")
    with parts.evaluation_weights:
        parts.policy.export(folder / "hf")
    metrics = {n: v if math.isfinite(v) else None for n, v in state.metrics.items()}
    stands = {**asdict(state), "metrics": metrics}
    _write_json(folder / "state.json", {"format": 1, "state": stands, "config": config})


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def _partial(checkpoint: Path) -> Path:
    """What a checkpoint is called while it is written or removed."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _remove_partial(folder: Path) -> None:
    for leftover in folder.glob(".step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Wait until a folder and everything in it is on disk."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
