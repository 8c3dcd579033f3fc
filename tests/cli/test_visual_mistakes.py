"""Mistakes of people who train image models: one sentence, exit code 2, nothing written."""

import json
import shutil

import pytest
from fixtures_flow import sd3_pipeline

from mmgrpo.cli.main import main

IMAGE = "quickstart/image"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd3"
    sd3_pipeline().save_pretrained(folder)
    return folder


def refuse(tmp_path, capsys, *overrides, config=IMAGE):
    """Run ``train``, expect exit 2 and one line; return it."""
    run_dir = tmp_path / "run"
    assert main(["train", config, f"run_dir={run_dir}", *overrides]) == 2
    said = capsys.readouterr()
    assert not run_dir.exists()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def changed(pipeline, tmp_path, change):
    """A copy of the pipeline's folder with a part changed."""
    folder = tmp_path / "pipe"
    shutil.copytree(pipeline, folder)
    change(folder)
    return f"model.path={folder}"


def test_a_component_is_missing(pipeline, tmp_path, capsys):
    path = changed(pipeline, tmp_path, lambda folder: shutil.rmtree(folder / "vae"))
    assert "vae" in refuse(tmp_path, capsys, path)


def test_the_scheduler_predicts_something_else(pipeline, tmp_path, capsys):
    def ddim(folder):
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
        settings = {"_class_name": "DDIMScheduler", "prediction_type": "sample"}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))

    line = refuse(tmp_path, capsys, changed(pipeline, tmp_path, ddim))
    assert "prediction type sample" in line


def test_the_window_is_larger_than_the_schedule(tmp_path, capsys):
    line = refuse(tmp_path, capsys, "method=mix-grpo", "rollout.num_steps=3")
    assert "rollout.num_steps 3" in line
    assert "window of 4 steps" in line


def test_a_split_point_lies_outside_the_schedule(tmp_path, capsys):
    line = refuse(
        tmp_path, capsys, "method=branch-grpo", "method.rollout.tree.splits=[0.0,1.0]",
        "rollout.group_size=4",
    )  # fmt: skip
    assert "split steps [10]" in line


def test_the_group_does_not_fit_the_tree_s_leaves(tmp_path, capsys):
    line = refuse(tmp_path, capsys, "method=branch-grpo", "rollout.group_size=12")
    assert "12" in line
    assert "16" in line


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        ("{name: image_pickscore, path: nowhere/pickscore}", "nowhere/pickscore"),
        ("{name: image_hps, path: nowhere/HPS_v2.1_compressed.pt}", "HPS_v2.1_compressed.pt"),
        ("{name: classifier_score, path: nowhere/classifier}", "nowhere/classifier"),
    ],
)
def test_a_reward_s_weights_are_not_there(tmp_path, capsys, reward, named):
    assert named in refuse(tmp_path, capsys, f"rewards=[{reward}]")


def test_nobody_answers_at_the_judge_s_address(tmp_path, capsys):
    judge = "{name: image_judge, url: 'http://127.0.0.1:9/v1', model: any}"
    assert "127.0.0.1:9" in refuse(tmp_path, capsys, f"rewards=[{judge}]")


def test_a_dry_run_lists_what_is_not_there_yet(tmp_path, capsys):
    rewards = (
        "{name: image_pickscore, path: nowhere/pickscore}, "
        "{name: image_judge, url: 'http://127.0.0.1:9/v1', model: any}"
    )
    ask = ["train", IMAGE, "--dry-run", f"run_dir={tmp_path}/run"]
    assert main([*ask, f"rewards=[{rewards}]"]) == 0
    said = capsys.readouterr().out
    assert said.count("not found") == 2
    assert "nowhere/pickscore" in said
    assert "127.0.0.1:9" in said
    assert main([*ask, f"rewards=[{rewards}, {{name: image_jpeg, quality: 100}}]"]) == 2
