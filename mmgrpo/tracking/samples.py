"""``samples/``: what the model wrote or drew, with its scores, for people to look at."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmgrpo.protocols import Sample
from mmgrpo.tracking.clips import contact_sheet, save_animation
from mmgrpo.tracking.pictures import Cell, draw_grid

SUFFIXES = {"train": "", "eval": "_eval"}
COLUMNS_WITHOUT_GROUPS = 4


def write_samples(
    run_dir: str | Path,
    step: int,
    samples: Sequence[Sample],
    rewards: Mapping[str, Tensor],
    advantage: Tensor | None = None,
    *,
    max_samples: int = 16,
    kind: str = "train",
) -> Path:
    """Write ``samples/step_NNNNNN.*`` (``step_NNNNNN_eval.*`` for evaluations).

    Text gives a transcript ``.md`` (and a ``.png`` of the prompts' images, if they have some);
    generated images give one ``.png`` with a row for each group, videos one of contact sheets and
    a ``.gif`` that plays them. Beside either, a ``.jsonl`` with one object per sample.

    Args:
        run_dir: the run folder.
        step: the step.
        samples: ``B`` samples.
        rewards: name -> ``[B]``.
        advantage: ``[B]`` or ``[B, T]``; of the latter the mean over decisions that have one.
        max_samples: how many to write; they are the first of the first groups.
        kind: ``train`` or ``eval``.

    Returns:
        The ``.md`` or the ``.png``.
    """
    folder = Path(run_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step_{step:06d}{SUFFIXES[kind]}"
    groups = pick_groups([sample.prompt.index for sample in samples], max_samples)
    scores = [
        {name: float(value[index]) for name, value in rewards.items()}
        for index in range(len(samples))
    ]
    advantages = _per_sample(advantage, len(samples))
    records = {
        index: _record(step, samples[index], scores[index], advantages[index])
        for group in groups
        for index in group
    }
    if any(still(samples[index]) is not None for index in records):
        main = folder / f"{stem}.png"
        draw_samples(samples, records, groups).save(main)
        if any(samples[index].video is not None for index in records):
            _play(samples, records, groups, main.with_suffix(".gif"))
    else:
        has_images = _draw_prompts(samples, groups, folder / f"{stem}.png")
        main = folder / f"{stem}.md"
        text = transcript(f"{kind} samples of step {step}", samples, records, groups)
        link = f"\n![prompts]({stem}.png)\n" if has_images else ""
        main.write_text(text.replace("\n", f"\n{link}", 1), encoding="utf-8")
    lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records.values())
    (folder / f"{stem}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return main


def pick_groups(prompts: Sequence[int], max_samples: int) -> list[list[int]]:
    """Choose which samples to show: the first few of each of the first groups.

    Args:
        prompts: the prompt of each sample.
        max_samples: at most this many in all.

    Returns:
        Positions, group by group.
    """
    groups: dict[int, list[int]] = {}
    for position, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(position)
    if len(prompts) <= max_samples:
        return list(groups.values())
    each = max(math.ceil(math.sqrt(max_samples)), max_samples // len(groups))
    chosen: list[list[int]] = []
    left = max_samples
    for group in groups.values():
        part = group[: min(each, left)]
        left -= len(part)
        chosen += [part] if part else []
    return chosen


def transcript(
    title: str,
    samples: Sequence[Sample],
    records: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Sequence[int]],
) -> str:
    """Return the samples as Markdown, group by group."""
    lines = [f"# {title}", ""]
    for group in groups:
        prompt = samples[group[0]].prompt
        lines += [f"## prompt {prompt.index}", "", _fence(prompt_text(prompt.content)), ""]
        known = {key: value for key, value in prompt.columns.items() if _is_short(value)}
        if known:
            lines += [", ".join(f"{key}: `{value}`" for key, value in known.items()), ""]
        for index in group:
            lines += ["### " + " · ".join(_captions(records[index])), ""]
            lines += [_fence(samples[index].completion or ""), ""]
    return "\n".join(lines)


def still(sample: Sample) -> Any:
    """Return the sample's image, or a contact sheet of its video."""
    return sample.image if sample.video is None else contact_sheet(sample.video)


def draw_samples(
    samples: Sequence[Sample],
    records: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Sequence[int]],
    picture: Callable[[Sample], Any] = still,
) -> Any:
    """Draw what was generated with its scores: a row per group, under its prompt.

    Groups of one are laid out four in a row, each with its prompt in the caption. ``picture`` says
    what shows a sample.
    """
    several = any(len(group) > 1 for group in groups)

    def cell(index: int) -> Cell:
        own = [] if several else [prompt_text(samples[index].prompt.content)]
        return Cell(picture(samples[index]), (*own, *_captions(records[index])))

    if several:
        titles = [prompt_text(samples[group[0]].prompt.content) for group in groups]
        return draw_grid([[cell(index) for index in group] for group in groups], titles)
    cells = [cell(index) for group in groups for index in group]
    width = COLUMNS_WITHOUT_GROUPS
    return draw_grid([cells[start : start + width] for start in range(0, len(cells), width)])


def _play(
    samples: Sequence[Sample],
    records: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Sequence[int]],
    path: Path,
) -> None:
    """Write the grid as an animation: page n has frame n of every video, or its last."""

    def page(number: int) -> Any:
        def frame(sample: Sample) -> Any:
            assert sample.video is not None
            return sample.video[min(number, len(sample.video) - 1)]

        return draw_samples(samples, records, groups, frame)

    save_animation([samples[index].video or () for index in records], page, path)


def prompt_text(content: str | list[dict[str, Any]]) -> str:
    """Return a prompt as plain text: the messages' texts, each image as ``[image]``."""
    if isinstance(content, str):
        return content
    single = len(content) == 1
    return "\n".join(
        ("" if single else f"{message['role']}: ") + _message_text(message["content"])
        for message in content
    )


def _message_text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else "[image]" for part in content)


def _record(
    step: int, sample: Sample, scores: Mapping[str, float], advantage: float | None
) -> dict[str, Any]:
    return {
        "step": step,
        "row": sample.prompt.index,
        "prompt": sample.prompt.content,
        "columns": sample.prompt.columns,
        "completion": sample.completion,
        "rewards": {name: None if math.isnan(value) else value for name, value in scores.items()},
        "advantage": advantage,
        "truncated": sample.truncated,
        "length": sample.length,
        **({"mismatch": list(sample.mismatch)} if sample.mismatch else {}),
    }


def _captions(record: Mapping[str, Any]) -> list[str]:
    captions = [
        f"{name} n/a" if value is None else f"{name} {value:.2f}"
        for name, value in record["rewards"].items()
    ]
    if record["advantage"] is not None:
        captions.append(f"advantage {record['advantage']:+.2f}")
    return captions + (["truncated"] if record["truncated"] else [])


def _per_sample(advantage: Tensor | None, size: int) -> list[float | None]:
    if advantage is None:
        return [None] * size
    if advantage.dim() == 2:
        advantage = advantage.sum(dim=1) / (advantage != 0).sum(dim=1).clamp(min=1)
    return [float(value) for value in advantage]


def _draw_prompts(samples: Sequence[Sample], groups: Sequence[Sequence[int]], path: Path) -> bool:
    """Draw the prompts' images, a row per prompt; False if there are none."""
    prompts = [samples[group[0]].prompt for group in groups]
    prompts = [prompt for prompt in prompts if len(prompt.images)]
    if prompts:
        rows = [[Cell(image) for image in prompt.images] for prompt in prompts]
        draw_grid(rows, [f"prompt {prompt.index}" for prompt in prompts]).save(path)
    return bool(prompts)


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _is_short(value: Any) -> bool:
    return value is not None and len(str(value)) <= 200
