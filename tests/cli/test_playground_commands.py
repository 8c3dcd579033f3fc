"""``build`` and ``quickstart``: folders that are refused, tables that tell the truth."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

import mmgrpo
from mmgrpo.cli import quickstart
from mmgrpo.cli.main import main
from mmgrpo.playground import build as playground_build


@pytest.fixture
def builders(tmp_path, monkeypatch):
    """Stand-ins for the builders, in an empty current folder; returns their calls."""
    calls = []
    fake = ModuleType("fake_builders")

    def make(task):
        def build(out_dir, *, seed=0, progress=None):
            progress(f"{task}: building")
            out_dir.mkdir(parents=True)
            (out_dir / "train.jsonl").write_text(str(seed))
            calls.append((task, str(out_dir), seed))

        return build

    for task in playground_build.TASKS:
        setattr(fake, task, make(task))
        monkeypatch.setitem(playground_build.TASKS, task, f"fake_builders:{task}")
    monkeypatch.setitem(sys.modules, "fake_builders", fake)
    monkeypatch.chdir(tmp_path)
    return calls


def test_build_makes_one_task_or_all(builders, capsys):
    assert main(["build", "vision", "--out", "pg", "--seed", "3"]) == 0
    assert builders == [("vision", "pg/vision", 3)]
    assert capsys.readouterr().out == "vision: building\npg/vision\n"
    builders.clear()
    assert main(["build"]) == 0
    assert [call[0] for call in builders] == [*playground_build.TASKS]


def test_build_refuses_a_folder_that_is_not_empty_before_it_starts(builders, tmp_path, capsys):
    (tmp_path / "pg/image").mkdir(parents=True)
    (tmp_path / "pg/image/mine").write_text("")
    assert main(["build", "all", "--out", "pg"]) == 2
    assert capsys.readouterr().err == "error: pg/image is not empty; choose another --out.\n"
    assert builders == []


def test_build_names_the_nearest_task(builders, capsys):
    assert main(["build", "vison"]) == 2
    assert capsys.readouterr().err == (
        "error: unknown playground task 'vison'; did you mean 'vision'?\n"
    )
    assert builders == []


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A stand-in for training that writes what a run leaves, in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def train(config):
        run_dir = tmp_path / config.run_dir
        (run_dir / "samples").mkdir(parents=True)
        rows = [{"step": 0, "eval/success": 0.3}, {"step": 1, "loss": 1.0}]
        rows.append({"step": 2, "eval/success": 0.9 + config.trainer.steps / 1000})
        (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        for name in ("curve.svg", "before_after.png", "config.yaml", "samples/step_000000.png"):
            (run_dir / name).write_text("")

    monkeypatch.setattr(mmgrpo, "build", SimpleNamespace(train=train), raising=False)
    monkeypatch.setitem(sys.modules, "mmgrpo.build", SimpleNamespace(train=train))
    return tmp_path


def fake_config(modality):
    return SimpleNamespace(
        modality=modality, run_dir=f"runs/quickstart-{modality}", trainer=SimpleNamespace(steps=10)
    )


def test_quickstart_trains_the_three_and_ends_with_one_table(trained, monkeypatch, capsys):
    asked = []

    def load(name, overrides):
        asked.append((name, overrides))
        return fake_config(name.partition("/")[2])

    monkeypatch.setattr("mmgrpo.config.load_config", load)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["quickstart", "trainer.steps=10"]) == 0
    assert asked == [(f"quickstart/{task}", ["trainer.steps=10"]) for task in quickstart.TASKS]
    lines = capsys.readouterr().out.splitlines()
    for task in quickstart.TASKS:
        (row,) = [line for line in lines if line.startswith(f"│ {task}")]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == [task, "0.30", "0.91", "0", f"runs/quickstart-{task}"]
    assert [line for line in lines if line.startswith("picture")][-2:] == [
        "picture: runs/quickstart-image/before_after.png",
        "picture: runs/quickstart-image/curve.svg",
    ]


def test_quickstart_stops_at_a_wrong_override_before_training(trained, capsys):
    assert main(["quickstart", "trainer.lr=1"]) == 2
    assert not (trained / "runs").exists()
