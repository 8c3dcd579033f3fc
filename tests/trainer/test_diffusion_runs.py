"""Whole runs of a tiny noise-predicting pipeline: a UNet with random weights, DDPO, a reward."""

import json

import pytest
from fixtures_diffusion import sd15_pipeline
from fixtures_runs import REWARDS, document, metrics_of

from mmgrpo import build
from mmgrpo.config import load_config

pytest.importorskip("diffusers")


def test_a_unet_learns_to_draw_brighter_pictures(tmp_path):
    (tmp_path / "image").mkdir()
    sd15_pipeline().save_pretrained(tmp_path / "image" / "model")
    rows = [json.dumps({"prompt": f"draw {word}"}) for word in ("red", "blue")]
    (tmp_path / "image" / "train.jsonl").write_text("\n".join(rows))
    doc = document(
        tmp_path,
        "image",
        tmp_path / "run",
        method="ddpo",
        rewards=[f"{REWARDS}:brightness"],
        rollout={"group_size": 12, "prompts_per_step": 2, "num_steps": 4, "guidance_scale": 2.0},
        trainer={"steps": 8, "learning_rate": 1e-2},
        eval={"samples": 8},
    )
    doc["data"]["eval"] = doc["data"]["train"]
    build.train(load_config(doc))
    rows = metrics_of(tmp_path / "run")
    before, after = (rows[place]["eval/success"] for place in (0, -1))  # from the same noise
    assert after > before + 0.01
    assert all(row["ratio/first_max_deviation"] < 1e-4 for row in rows[1:])
    assert all(row["count/generated_decisions"] == 24 * 4 for row in rows[1:])
