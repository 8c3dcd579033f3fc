"""Keep the samples on which a reward failed, so that the failure can be looked at."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmgrpo.protocols import Sample

MAX_SAVED = 64


def save_failures(
    save_dir: Path,
    *,
    step: int,
    reward: str,
    samples: Sequence[Sample],
    causes: Mapping[int, str],
    exception: BaseException | None = None,
) -> Path:
    """Write ``failed_rewards/step_NNNNNN_<reward>.json`` and the samples' images beside it.

    Args:
        save_dir: the run folder.
        step: the step.
        reward: name of the reward.
        samples: all samples of the call.
        causes: index of a sample that failed -> cause; at most 64 are written.
        exception: its traceback is written too.

    Returns:
        The JSON file; its name gets a number if it exists.
    """
    folder = save_dir / "failed_rewards"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step_{step:06d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', reward)}"
    number = 1
    while True:
        name = stem if number == 1 else f"{stem}_{number}"
        try:
            stream = (folder / f"{name}.json").open("x", encoding="utf-8")
            break
        except FileExistsError:
            number += 1
    record = {
        "step": step,
        "reward": reward,
        "failed": len(causes),
        "samples": [
            _record(folder, name, index, samples[index], cause)
            for index, cause in list(causes.items())[:MAX_SAVED]
        ],
        "traceback": "".join(traceback.format_exception(exception)) if exception else None,
    }
    with stream:
        json.dump(record, stream, indent=2, ensure_ascii=False, default=str)
    return folder / f"{name}.json"


def _record(folder: Path, name: str, index: int, sample: Sample, cause: str) -> dict[str, object]:
    made = sample.video if sample.image is None else [sample.image]
    images = list(sample.prompt.images if made is None else made)
    files = [f"{name}_sample{index}_{number}.png" for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        image.save(folder / file)
    return {
        "sample": index,
        "cause": cause,
        "row": sample.prompt.index,
        "prompt": sample.prompt.content,
        "completion": sample.completion,
        "images": files,
        "columns": sample.prompt.columns,
    }
