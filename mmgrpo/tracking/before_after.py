"""What a run changed, at one glance: its first and last samples side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmgrpo.tracking.curve import write_curve
from mmgrpo.tracking.samples import prompt_text

MAX_PROMPTS = 6


def write_summary(run_dir: str | Path) -> list[Path]:
    """Write the curve and the before/after page; return the files that could be made."""
    return [path for path in (before_after(run_dir), write_curve(run_dir)) if path is not None]


def before_after(run_dir: str | Path) -> Path | None:
    """Write ``before_after.png`` (images) or ``before_after.md`` (text).

    Evaluation samples are compared where there are two sets of them, since they answer the same
    prompts; otherwise training samples.

    Returns:
        The file, or None if the run has fewer than two sets of samples.
    """
    run_dir = Path(run_dir)
    everything = sorted((run_dir / "samples").glob("step_*.jsonl"))
    of_evaluation = [path for path in everything if path.stem.endswith("_eval")]
    of_training = [path for path in everything if path not in of_evaluation]
    files = of_evaluation if len(of_evaluation) > 1 else of_training
    if len(files) < 2:
        return None
    first, last = files[0], files[-1]
    if _read(first)[0]["completion"] is None:
        return _pictures(run_dir, first, last)
    path = run_dir / "before_after.md"
    path.write_text(_page(_read(first), _read(last)), encoding="utf-8")
    return path


def _pictures(run_dir: Path, first: Path, last: Path) -> Path:
    from PIL import Image

    from mmgrpo.tracking.pictures import side_by_side

    titles = (f"step {_step(first)}", f"step {_step(last)}")
    with (
        Image.open(first.with_suffix(".png")) as left,
        Image.open(last.with_suffix(".png")) as right,
    ):
        picture = side_by_side(left, right, titles)
    path = run_dir / "before_after.png"
    picture.save(path)
    return path


def _page(first: list[dict[str, Any]], last: list[dict[str, Any]]) -> str:
    """One sample of each prompt that both sets have; of the first prompts if none is shared."""
    before = {row["row"]: row for row in reversed(first)}
    after = {row["row"]: row for row in reversed(last)}
    shared = [row for row in reversed(after) if row in before][:MAX_PROMPTS]
    rows = [before[row] for row in shared] + [after[row] for row in shared]
    if not shared:
        rows = list(before.values())[-MAX_PROMPTS:] + list(after.values())[-MAX_PROMPTS:]
    rows.sort(key=lambda row: (row["row"], row["step"]))
    lines = ["# Before and after", ""]
    for number, row in enumerate(rows):
        if number == 0 or row["row"] != rows[number - 1]["row"]:
            lines += [f"## prompt {row['row']}", "", _quote(prompt_text(row["prompt"])), ""]
        scores = ", ".join(f"{name} {value}" for name, value in row["rewards"].items())
        lines += [f"**step {row['step']}** ({scores})", "", _quote(row["completion"]), ""]
    return "\n".join(lines)


def _quote(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (nothing)"


def _step(path: Path) -> int:
    return int(path.stem.split("_")[1])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
