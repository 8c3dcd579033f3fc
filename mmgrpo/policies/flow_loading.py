"""Diffusers pipeline folders: from a path to a frozen pipeline, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmgrpo.errors import MissingExtraError, ModelError, nearest
from mmgrpo.policies.flow_families import check_family
from mmgrpo.policies.loading import first_line, parse_dtype


def load_pipeline(path: str | Path, *, dtype: str) -> Any:
    """Load a text-to-image or text-to-video pipeline of a known family.

    Args:
        path: a local folder, or a hub id such as ``stabilityai/stable-diffusion-3.5-medium``.
        dtype: name of the dtype of transformer and text encoders; the VAE is float32 always,
            because half precision bends the colours that rewards see.

    Raises:
        ModelError: a missing or incomplete folder, or a pipeline of an unknown family.
    """
    diffusers = _diffusers()
    weights = parse_dtype(dtype)
    index = _read_index(path) if Path(path).is_dir() else _fetch_index(path)
    check_family(str(index.get("_class_name")))
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    absent = {name: None for name, (library, *_) in parts.items() if library is None}
    if Path(path).is_dir():
        _check_parts(Path(path), [name for name in parts if name not in absent])
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            path, dtype={"default": weights, "vae": torch.float32}, **absent
        )
    except (OSError, ValueError, ImportError, RuntimeError, TypeError) as error:
        raise ModelError(f"Cannot load the pipeline {path}: {first_line(error)}") from error
    return pipe


def prepare_pipeline(pipe: Any, dtype: torch.dtype) -> None:
    """Freeze every component and put it in evaluation mode; all but the VAE get ``dtype``.

    What a model's class keeps in float32 stays so.
    """
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            wanted = torch.float32 if name == "vae" else dtype
            kept = getattr(component, "_keep_in_fp32_modules", None) or ()
            weights = component.named_parameters()
            if any(p.dtype != wanted for n, p in weights if not any(part in n for part in kept)):
                component.to(wanted)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "image") from error
    return diffusers


def _read_index(path: str | Path) -> dict[str, Any]:
    try:
        index = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is no pipeline folder: its model_index.json cannot be read; expected what "
            "save_pretrained of a diffusers pipeline writes."
        ) from error
    return dict(index)


def _fetch_index(path: str | Path) -> dict[str, Any]:
    text = str(path)
    if isinstance(path, Path) or text.count("/") != 1 or text[0] in "/.~":
        parent = Path(path).parent
        siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        hint = nearest(Path(path).name, siblings) if siblings else "."
        raise ModelError(f"The model folder {path} does not exist{hint}")
    try:
        return dict(_diffusers().DiffusionPipeline.load_config(text))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot find the pipeline {path}: {first_line(error)}") from error


def _check_parts(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise ModelError(
            f"The pipeline folder {folder} is incomplete: it has no {' and no '.join(missing)} "
            f"(its model_index.json names {', '.join(names)})."
        )
