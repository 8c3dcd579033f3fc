"""What cannot run is refused with exit 2 and one sentence, before anything is written."""

import json
import shutil

import pytest
from fixtures_runs import REWARDS, document, merged, metrics_of, write_config

from mmgrpo.checks import check_method
from mmgrpo.cli.main import main
from mmgrpo.config import load_config
from mmgrpo.config.compare import FREE_KEYS, first_difference
from mmgrpo.methods import load_method
from mmgrpo.trainer.run_folder import checkpoints

QUICK = {
    "trainer": {"steps": 1},
    "rollout": {"prompts_per_step": 2},
    "model": {"lora": {"rank": 2}},
}


def text(models, run_dir, **changes):
    return document(models, "text", run_dir, **merged(QUICK, changes))


def train(tmp_path, doc, *overrides):
    return main(["train", str(write_config(tmp_path / "run.yaml", doc)), *overrides])


def snapshot(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A run folder and its configuration; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder, text(models, folder / "run")) == 0
    return folder


@pytest.fixture
def run(finished, models, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return text(models, tmp_path / "run")


def refused(tmp_path, doc, capsys, *parts, overrides=()):
    before = snapshot(tmp_path)
    assert train(tmp_path, doc, *overrides) == 2
    err = capsys.readouterr().err
    for part in parts:
        assert part in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    after = snapshot(tmp_path)
    after.pop(next(iter(p for p in after if p.name == "run.yaml")), None)
    before.pop(next(iter(p for p in before if p.name == "run.yaml"), None), None)
    assert after == before


# -- the run folder -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trainer": {"learning_rate": 0.5}}, "trainer.learning_rate is 0.001 there and 0.5 here"),
        ({"method": "rloo"}, "method.id is 'dr-grpo' there and 'rloo' here"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"model": {"lora": None}}, "model.lora"),
    ],
)
def test_another_run(run, tmp_path, capsys, changes, named):
    refused(tmp_path, merged(run, changes), capsys, "holds another run", named, "another run_dir")


def test_files_that_are_no_run(models, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("x")
    refused(tmp_path, text(models, tmp_path / "run"), capsys, "not empty and holds no run")


def test_a_file_in_its_place(models, tmp_path, capsys):
    (tmp_path / "run").write_text("x")
    refused(tmp_path, text(models, tmp_path / "run"), capsys, "is a file")


def test_hidden_files_are_nobodys_run(models, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").write_text("x")
    (tmp_path / "run" / ".config.yaml.partial").write_text("half")
    assert train(tmp_path, text(models, tmp_path / "run")) == 0


def test_resume_never(run, models, tmp_path, capsys):
    refused(tmp_path, merged(run, {"resume": "never"}), capsys, "resume is 'never'")
    assert train(tmp_path, text(models, tmp_path / "new", resume="never")) == 0


def test_the_checkpoint_of_another_configuration(run, tmp_path, capsys):
    file = tmp_path / "run" / "checkpoints" / "step_000001" / "state.json"
    state = json.loads(file.read_text())
    state["config"]["trainer"]["learning_rate"] = 0.5
    file.write_text(json.dumps(state))
    refused(
        tmp_path, run, capsys, "step_000001 is of another configuration",
        "trainer.learning_rate is 0.5 there and 0.001 here",
    )  # fmt: skip
    file.write_text("{}")
    refused(tmp_path, run, capsys, "is not the state of a checkpoint")


def test_what_may_change_between_a_run_and_its_continuation(run, tmp_path):
    longer = merged(
        run,
        {
            "trainer": {"steps": 2, "save_every": 1, "micro_batch_size": 2, "keep_checkpoints": 1},
            "reward_timeout_s": 60.0,
        },
    )
    assert train(tmp_path, longer) == 0
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_000002"]
    assert load_config(tmp_path / "run" / "config.yaml").trainer.steps == 2


def test_free_keys_exist_and_every_other_key_counts(models, tmp_path):
    config = load_config(text(models, tmp_path / "run")).model_dump()

    def paths(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from paths(value, f"{prefix}{key}.")
            yield f"{prefix}{key}"

    known = set(paths(config))
    assert set(FREE_KEYS) <= known
    for path in known:
        changed = json.loads(json.dumps(config))
        *way, last = path.split(".")
        inner = changed
        for key in way:
            inner = inner[key]
        inner[last] = "something else"
        free = any(path == key or path.startswith(f"{key}.") for key in FREE_KEYS)
        difference = first_difference(config, changed)
        assert (difference is None) == free, path
    assert first_difference(config, json.loads(json.dumps(config))) is None


def test_more_than_a_million_steps_are_still_in_order(tmp_path):
    for step in (999999, 1000000, 20):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    assert [path.name[5:] for path in checkpoints(tmp_path)] == ["000020", "999999", "1000000"]


# -- combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"method": "cpgd", "trainer": {"epochs": 2}},
            ["cpgd has no importance ratio and passes over a rollout once", "epochs is 2"],
        ),
        (
            {"method": "gpg", "trainer": {"minibatches": 2}},
            ["gpg has no importance ratio", "one update per rollout", "is 2, expected 1"],
        ),
        (
            {"method": "opo", "trainer": {"epochs": 3}},
            ["opo has no importance ratio", "minibatches x trainer.epochs is 3"],
        ),
        (
            {"method": "grpo", "rollout": {"group_size": 1}},
            ["grpo compares the samples of a group", "group_size is 1", "at least 2"],
        ),
        (
            {"method": "grpo", "model": {"reference": "none"}},
            ["grpo is held to a reference", "model.reference is 'none'", "'auto'"],
        ),
        ({"trainer": {"minibatches": 3}}, ["minibatches is 3", "prompts_per_step 2"]),
        ({"method": "flow-grpo"}, ["'flow-grpo' is for image, video, not for text"]),
        ({"rollout": {"prompts_per_step": 100}}, ["12 rows", "asks for 100 different prompts"]),
        ({"tracking": {"trackers": ["tensorbord"]}}, ["tensorbord", "did you mean 'tensorboard'"]),
        ({"rewards": ["exact_answr"]}, ["exact_answr", "exact_answer"]),
        ({"rewards": [f"{REWARDS}:brightness"]}, ["brightness", "images"]),
        ({"model": {"path": "/nowhere/at/all"}}, ["/nowhere/at/all", "does not exist"]),
        ({"data": {"train": "/nowhere.jsonl"}}, ["/nowhere.jsonl"]),
        ({"data": {"eval": "/nowhere.jsonl"}}, ["/nowhere.jsonl"]),
        ({"eval": {"judge": "exact_answr"}, "data": {"eval": "TRAIN"}}, ["exact_answr"]),
        ({"model": {"max_prompt_tokens": 3}}, ["jsonl:1: the prompt has 4 tokens", "at most 3"]),
        ({"rollout": {"max_new_tokens": 159}}, ["at most 1 fit"]),
        ({"rollout": {"max_new_tokens": 160}}, ["context of 160 tokens"]),
        ({"model": {"lora": None, "reference": "adapter_off"}, "method": "grpo"}, ["adapter"]),
        ({"model": {"lora": {"targets": ["q_prj"]}}}, ["q_prj", "q_proj"]),
    ],
)  # fmt: skip
def test_refused(models, tmp_path, capsys, changes, parts):
    doc = text(models, tmp_path / "run", **changes)
    if doc["data"].get("eval") == "TRAIN":
        doc["data"]["eval"] = doc["data"]["train"]
    refused(tmp_path, doc, capsys, *parts)


def test_a_tracker_that_is_not_installed(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmgrpo.checks.find_spec", lambda name: None)
    doc = text(models, tmp_path / "run", tracking={"trackers": ["tensorboard"]})
    refused(tmp_path, doc, capsys, "tensorboard is not installed", "mmgrpo[tracking]")


def test_a_dry_run_refuses_the_same_combination(models, tmp_path, capsys):
    doc = text(models, tmp_path / "run", method="cpgd", trainer={"epochs": 2})
    refused(tmp_path, doc, capsys, "passes over a rollout once", overrides=["--dry-run"])


def test_one_epoch_may_have_several_minibatches(models, tmp_path):
    config = load_config(text(models, tmp_path, method="cpgd", trainer={"minibatches": 2}))
    check_method(load_method("cpgd"), config)


def test_dry_run_counts(models, tmp_path, capsys):
    doc = text(
        models, tmp_path / "run", method="dapo",
        trainer={"steps": 10, "minibatches": 2, "epochs": 3, "micro_batch_size": 3},
        rollout={"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6}, eval={"every": 4},
    )  # fmt: skip
    doc["data"]["eval"] = doc["data"]["train"]
    assert train(tmp_path, doc, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "16 samples (4 prompts x 4), at most 96 decisions, up to 3 rounds" in shown
    assert "6 optimiser step(s), 18 backward pass(es) of at most 3 samples" in shown
    assert "10 steps, 160 samples, at most 960 decisions, 4 evaluation(s)" in shown
    assert not (tmp_path / "run").exists()
