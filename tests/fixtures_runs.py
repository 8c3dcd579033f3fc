"""Runs of a few steps on tiny random models, one per modality, as folders and configurations."""

from __future__ import annotations

import copy
import json
import os
import string
import subprocess
import sys
from pathlib import Path

import yaml
from fixtures_flow import WORDS, sd3_pipeline
from fixtures_image_tokens import save_parts, tiny_parts
from fixtures_tokens import canvas, tiny_text, tiny_vision

ROOT = Path(__file__).parents[1]
REWARDS = Path(__file__).parent / "trainer" / "tiny_rewards.py"
MODALITIES = ("text", "vision", "image")


def write_models(folder):
    """Write the three models and their data, once per test session."""
    _write_text(folder / "text")
    _write_vision(folder / "vision")
    _write_image(folder / "image")
    _write_image_tokens(folder / "image_tokens")
    return folder


def _write_text(folder):
    model, tokenizer = tiny_text()
    _save(folder, model, tokenizer)
    rows = [
        {"prompt": f"{a}+{b * 7}=", "answer": str(a + b * 7)} for a in range(6) for b in (1, 22)
    ]
    _write_rows(folder, rows)


def _write_vision(folder):
    from mmgrpo.policies.loading import save_processor

    model, processor = tiny_vision()
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "model")
    save_processor(processor, folder / "model")
    rows = []
    for index in range(10):
        sizes = [(16, 16), (24, 16)][: 1 + index % 2]
        names = [f"{index}_{number}.png" for number in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            canvas(*size, seed=index).save(folder / name)
        rows.append({"prompt": f"Which number {index}?", "images": names, "answer": "1"})
    _write_rows(folder, rows)


def _write_image(folder):
    folder.mkdir(parents=True)
    sd3_pipeline().save_pretrained(folder / "model")
    _write_rows(folder, [{"prompt": f"draw the number {word}"} for word in WORDS])


def _write_image_tokens(folder):
    folder.mkdir(parents=True)
    save_parts(tiny_parts(), folder / "model")
    questions = [["what", "x"], ["how many", "1"]]
    _write_rows(folder, [{"prompt": f"draw {word}", "questions": questions} for word in WORDS])


def _save(folder, model, tokenizer):
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _write_rows(folder, rows):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))


_ENDINGS = list(string.ascii_letters)  # so that most completions of a random model end
_ROLLOUTS = {
    "text": {"max_new_tokens": 6, "stop": _ENDINGS},
    "vision": {"max_new_tokens": 6, "stop": _ENDINGS},
    "image": {"num_steps": 4},
    "image_tokens": {},
}
_REWARD = {
    "text": "spread",
    "vision": "spread",
    "image": "brightness",
    "image_tokens": "brightness",
}


def document(models, modality, run_dir, **changes):
    """A configuration as a mapping; ``changes`` are sections to update or keys to set."""
    folder = Path(models) / modality
    base = {
        "modality": modality,
        "method": "dr-grpo",
        "run_dir": str(run_dir),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl")},
        "rewards": [{"name": f"{REWARDS}:{_REWARD[modality]}"}],
        "rollout": {"group_size": 4, "prompts_per_step": 4, **_ROLLOUTS[modality]},
        "trainer": {"steps": 4, "learning_rate": 1e-3},
    }
    return merged(base, changes)


def folder_document(folder, run_dir, modality, method, reward, **rollout):
    """A configuration of two steps on what a fixture of its own has written into a folder."""
    return {
        "modality": modality,
        "method": method,
        "run_dir": str(run_dir),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl")},
        "rewards": [{"name": f"{REWARDS}:{reward}"}],
        "rollout": {"group_size": 4, "prompts_per_step": 4, **rollout},
        "trainer": {"steps": 2, "learning_rate": 1e-3},
    }


def merged(base, changes):
    """``base`` with mappings merged and everything else replaced."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = merged(inner, value) if both else value
    return result


def write_config(path, doc):
    """Write a configuration file and return its path."""
    Path(path).write_text(yaml.safe_dump(doc))
    return path


def command(*arguments, environment=None, launcher=("-m", "mmgrpo")):
    """Start ``mmgrpo`` in a process of its own; returns the Popen, output piped as text."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process, timeout=300):
    """Wait; return (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def metrics_of(run_dir, *, without=("time/",)):
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(tuple(without))} for row in rows]


def weight_bytes(run_dir):
    """The exported weights of the newest checkpoint: relative name -> bytes."""
    newest = max((Path(run_dir) / "checkpoints").glob("step_*"))
    files = sorted(newest.rglob("*.safetensors"))
    assert files
    return {file.relative_to(newest).as_posix(): file.read_bytes() for file in files}
