"""Whole runs on a tiny Wan folder: what is written, resumed, sampled and refused."""

from __future__ import annotations

import json
import math

import pytest
from fixtures_flow import WORDS, sd3_pipeline
from fixtures_runs import merged, metrics_of, weight_bytes, write_config
from fixtures_video import HEIGHT, NUM_FRAMES, WIDTH, wan_pipeline
from PIL import Image

from mmgrpo import Trainer
from mmgrpo.cli.main import main

REWARDS = """
import numpy as np

def flicker(videos, word):
    assert all(len(video) == 5 for video in videos)
    return [float(np.std([np.asarray(frame).mean() for frame in video])) for video in videos]

def still(images):
    return [0.0 for _ in images]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Wan folder, an image folder, prompts and rewards."""
    folder = tmp_path_factory.mktemp("video")
    wan_pipeline().save_pretrained(folder / "model")
    sd3_pipeline().save_pretrained(folder / "image_model")
    rows = [{"prompt": f"draw the {word}", "word": word} for word in WORDS]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def document(folder, run_dir, **changes):
    base = {
        "modality": "video",
        "method": "flow-grpo",
        "run_dir": str(run_dir),
        "model": {"path": str(folder / "model"), "max_prompt_tokens": 5},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "rewards": [{"name": f"{folder}/rewards.py:flicker"}],
        "rollout": {
            "group_size": 3, "prompts_per_step": 2, "num_steps": 3, "height": HEIGHT,
            "width": WIDTH, "num_frames": NUM_FRAMES, "guidance_scale": 3.0,
            "negative_prompt": "blue square",
        },
        "trainer": {"steps": 3, "learning_rate": 1e-3, "save_every": 1, "keep_checkpoints": 4},
    }  # fmt: skip
    return merged(base, changes)


def train(tmp_path, doc):
    return main(["train", str(write_config(tmp_path / "run.yaml", doc))])


def test_a_run_writes_plays_resumes_and_samples(folder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(tmp_path, document(folder, whole)) == 0
    rows = metrics_of(whole)
    assert {"reward/flicker", "eval/flicker", "ratio/mean"} <= set(rows[-1])
    assert all(row["ratio/mean"] == pytest.approx(1, abs=1e-4) for row in rows[1:])
    assert rows[1]["count/generated_decisions"] == 2 * 3 * 2
    for stem in ("step_000000_eval", "step_000001"):
        files = [whole / "samples" / f"{stem}{suffix}" for suffix in (".png", ".gif", ".jsonl")]
        assert all(file.is_file() for file in files), stem
        with Image.open(files[1]) as playing:
            assert playing.n_frames == NUM_FRAMES
    assert (whole / "before_after.png").is_file()

    for steps in (1, 3):  # stopped after the first step, then continued
        assert train(tmp_path, document(folder, parts, trainer={"steps": steps})) == 0
    assert weight_bytes(parts) == weight_bytes(whole)
    last = [row for row in metrics_of(parts) if row["step"] == 3][-1]
    assert last["reward/mean"] == rows[-1]["reward/mean"]

    config, checkpoint = str(tmp_path / "run.yaml"), str(whole / "checkpoints" / "step_000003")
    assert main(["sample", config, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").rglob("*.gif"))) == 1
    assert main(["eval", config, "--checkpoint", checkpoint]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": {"num_frames": 6}}, ["num_frames", "multiple of 4 plus 1", "nearest 5."]),
        ({"rollout": {"height": 20}}, ["video size must be a multiple of 8", "20 x 32"]),
        ({"rollout": {"num_frames": 0}}, ["rollout.num_frames", "greater than 0"]),
        ({"rollout": {"num_frame": 5}}, ["rollout.num_frame ", "mean 'rollout.num_frames'"]),
        ({"rewards": [{"name": "{folder}/rewards.py:still"}]},
         ["'still' asks for images", "'video' have prompts, videos"]),
        ({"rewards": [{"name": "exact_answer"}]}, ["completions", "videos"]),
        ({"modality": "image", "rollout": None}, ["draws videos", "modality 'video'"]),
        ({"model": {"path": "{folder}/image_model"}}, ["draws images", "modality 'image'"]),
        ({"model": {"path": "{folder}/broken"}}, ["incomplete", "no vae"]),
        ({"method": "gspo"}, ["gspo", "video"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(folder, tmp_path, capsys, changes, words):
    import shutil

    if not (folder / "broken").exists():
        shutil.copytree(folder / "model", folder / "broken")
        shutil.rmtree(folder / "broken" / "vae")
    changes = json.loads(json.dumps(changes).replace("{folder}", str(folder)))
    doc = document(folder, tmp_path / "run", **changes)
    if changes.get("modality") == "image":
        doc["rollout"] = {"num_steps": 3}
        doc["rewards"] = [{"name": f"{folder}/rewards.py:still"}]
    capsys.readouterr()
    assert train(tmp_path, doc) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "error" in line]) == 1, lines
    for word in words:
        assert word in lines[-1]
    assert not (tmp_path / "run").exists()


def test_a_script_needs_only_the_folder(folder, tmp_path):
    def brightness(prompts, videos, word):
        assert len(prompts) == len(videos) == len(word)
        return [sum(frame.convert("L").getextrema()[1] for frame in video) for video in videos]

    trainer = Trainer(
        policy=folder / "model", reward=brightness, data=folder / "train.jsonl",
        method="flow-grpo", run_dir=str(tmp_path / "run"), steps=1, learning_rate=1e-3,
        group_size=2, prompts_per_step=2, num_steps=2, height=HEIGHT, width=WIDTH,
        num_frames=NUM_FRAMES, max_prompt_tokens=5,
    )  # fmt: skip
    assert trainer.config.modality == "video"
    trainer.train()
    assert math.isfinite(metrics_of(tmp_path / "run")[-1]["reward/brightness"])
