"""Building the playground: small half-trained models with their data, reproducibly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmgrpo.errors import UsageError, nearest
from mmgrpo.registry import load_target

TASKS = {
    "text": "mmgrpo.playground.text:build_text",
    "vision": "mmgrpo.playground.vision:build_vision",
    "image": "mmgrpo.playground.image:build_image",
    "image_tokens": "mmgrpo.playground.image_tokens:build_image_tokens",
    "image_scales": "mmgrpo.playground.image_scales:build_image_scales",
    "masks": "mmgrpo.playground.masks:build_masks",
    "shapes": "mmgrpo.playground.shapes:build_shapes",
    "masked_text": "mmgrpo.playground.masked_text:build_masked_text",
    "video": "mmgrpo.playground.video:build_video",
}
ALL = "all"


def build(
    task: str,
    out: str | Path,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Build one task, or all, into ``out/<task>``.

    Args:
        task: a key of ``TASKS``, or ``all``.
        out: the parent folder; made if missing.
        seed: decides data and weights.
        progress: receives lines of text.

    Returns:
        The folders that were built.

    Raises:
        UsageError: unknown task, or a folder to build that is not empty. Nothing is written.
    """
    if task not in TASKS and task != ALL:
        raise UsageError(f"unknown playground task '{task}'{nearest(task, [*TASKS, ALL])}")
    folders = {name: Path(out) / name for name in ([*TASKS] if task == ALL else [task])}
    for folder in folders.values():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not empty; choose another --out.")
    for name, folder in folders.items():
        load_target(TASKS[name])(folder, seed=seed, progress=progress)
    return [*folders.values()]
