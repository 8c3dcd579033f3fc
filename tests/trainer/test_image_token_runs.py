"""Whole runs of image-token models: what is particular to them, and to controlled entropies."""

import json

import pytest
import torch
from fixtures_janus import CELLS, janus_parts, save_janus
from fixtures_runs import document, merged, metrics_of, weight_bytes
from safetensors.torch import load_file

from mmgrpo import build
from mmgrpo.api import infer_modality
from mmgrpo.config import load_config
from mmgrpo.config.image_layout import FILE
from mmgrpo.errors import ModelError, RewardError
from mmgrpo.policies.janus import write_layout
from mmgrpo.trainer import checkpoint

CONTROL = {"entropy_control": {"targets": [3.0, 2.0], "learning_rate": 0.01, "limit": 0.5}}
REASONED = {
    "method": {"id": "reasongen-r1", "regulariser": CONTROL},
    "model": {"plan_tokens": 3},
    "rollout": {"prompts_per_step": 2},
    "trainer": {"steps": 4, "minibatches": 2, "save_every": 2},
}


def run(models, run_dir, **changes):
    doc = document(models, "image_tokens", run_dir, **changes)
    build.train(load_config(doc))
    return metrics_of(run_dir)


def test_before_an_update_the_ratio_is_one(models, tmp_path):
    for plan in (0, 3):
        rows = run(models, tmp_path / str(plan), model={"plan_tokens": plan}, trainer={"steps": 1})
        assert rows[0]["ratio/first_max_deviation"] < 1e-5
        assert rows[0]["loss"] != 0
        assert rows[0]["length/truncated_fraction"] == 0


def test_a_resumed_run_has_the_controller_where_it_was(models, tmp_path, monkeypatch):
    whole = run(models, tmp_path / "whole", **REASONED)
    assert whole[0]["entropy_coefficient/segment_0"] != whole[-1]["entropy_coefficient/segment_0"]
    assert {"entropy/segment_0", "entropy/segment_1"} <= whole[0].keys()
    load = checkpoint.load_file

    def load_blurred(path):
        return {
            key: value + 0.01 if key == "entropy_control/psi" else value
            for key, value in load(path).items()
        }

    short = merged(REASONED, {"trainer": {"steps": 2}})
    for name, blurred in (("cut", False), ("blurred", True)):
        run(models, tmp_path / name, **short)
        if blurred:
            monkeypatch.setattr(checkpoint, "load_file", load_blurred)
        rows = run(models, tmp_path / name, **REASONED)
        same = weight_bytes(tmp_path / name) == weight_bytes(tmp_path / "whole")
        assert same != blurred
        assert (rows == whole) != blurred


def test_controlled_entropies_do_not_depend_on_the_micro_batches(models, tmp_path):
    changes = merged(REASONED, {"trainer": {"steps": 2, "minibatches": 1, "save_every": None}})
    one = run(models, tmp_path / "one", **changes)
    cut = run(models, tmp_path / "cut", **merged(changes, {"trainer": {"micro_batch_size": 3}}))
    for first, second in zip(one, cut, strict=True):
        for name in ("loss", "grad_norm", "entropy/segment_0", "entropy_coefficient/segment_1"):
            assert second[name] == pytest.approx(first[name], rel=1e-5), name


def test_self_answers_reward_the_model(models, tmp_path):
    asked = {"method": "unirl", "rewards": "self_answer", "trainer": {"steps": 1}}
    with pytest.raises(RewardError, match=r"set rollout.ask_questions=true"):
        run(models, tmp_path / "unasked", **asked)
    rows = run(models, tmp_path / "run", **asked, rollout={"ask_questions": True})
    assert rows[0]["reward/self_answer"] == 0.0  # a random model never says "x"


def test_answers_train_like_the_pictures_they_are_about(models, tmp_path):
    """Several updates and micro-batches of a rollout whose rows hold pictures and answers."""
    rollout = {"ask_questions": True, "train_answers": True, "max_answer_tokens": 3}
    changes = {"method": "simplear", "trainer": {"steps": 2, "minibatches": 2}, "rollout": rollout}
    one = run(models, tmp_path / "one", **changes)
    cut = run(models, tmp_path / "cut", **merged(changes, {"trainer": {"micro_batch_size": 3}}))
    for first, second in zip(one, cut, strict=True):
        assert first["ratio/first_max_deviation"] < 1e-5
        assert first["length/mean"] > 6 + 2  # two questions, and answers of a token or more
        for name in ("loss", "grad_norm", "kl"):
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-9), name


def test_a_run_leaves_a_folder_that_trains_again(models, tmp_path):
    run(models, tmp_path / "run", model={"plan_tokens": 3, "lora": {"rank": 2}}, method="simplear",
        trainer={"steps": 1}, eval={"samples": 2})  # fmt: skip
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert json.loads((newest / "hf" / FILE).read_text())["plan_tokens"] == 3
    rows = run(models, tmp_path / "full", method="dr-grpo", trainer={"steps": 1})
    assert rows[0]["grad_norm"] > 0
    newest = max((tmp_path / "full" / "checkpoints").glob("step_*"))
    model = {"path": str(newest / "hf")}
    again = run(models, tmp_path / "again", model=model, trainer={"steps": 1})
    assert again[0]["reward/mean"] > 0


def test_a_janus_trains_from_its_published_folder(models, tmp_path):
    folder = save_janus(janus_parts(), tmp_path / "janus")
    write_layout(folder, prompt_format="{prompt}")
    assert infer_modality(folder) == "image_tokens"
    model = {"path": str(folder), "plan_tokens": 3}
    rows = run(models, tmp_path / "run", model=model, trainer={"steps": 2})
    assert rows[0]["ratio/first_max_deviation"] < 1e-5
    assert rows[0]["grad_norm"] > 0
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    trained, before = (load_file(f / "model.safetensors") for f in (newest / "hf", folder))
    assert trained.keys() == before.keys()
    head = "model.generation_head.vision_head.weight"
    assert not torch.equal(trained[head], before[head])
    again = run(models, tmp_path / "again", model={"path": str(newest / "hf")},
                trainer={"steps": 1})  # fmt: skip
    assert again[0]["length/mean"] > CELLS


def test_the_folder_says_what_it_is(models):
    assert infer_modality(models / "image_tokens" / "model") == "image_tokens"


def test_the_plan_knows_how_long_a_sample_is(models, tmp_path):
    doc = document(models, "image_tokens", tmp_path / "run", model={"plan_tokens": 3})
    assert "at most 160 decisions" in build.plan(load_config(doc))
    doc["model"]["path"] = "somewhere/else"
    assert "decisions as the model says" in build.plan(load_config(doc))
    with pytest.raises(ModelError, match=r"has no image_tokens.json"):
        build.train(load_config(doc))
    assert not (tmp_path / "run").exists()
