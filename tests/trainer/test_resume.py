"""A run that was cut off, anywhere, and run again ends as if nothing had happened: bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from fixtures_runs import (
    REWARDS,
    command,
    document,
    finish,
    merged,
    metrics_of,
    weight_bytes,
    write_config,
)

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.errors import MmgrpoError
from mmgrpo.trainer import checkpoint, loop

LORA = {"model": {"lora": {"rank": 2}}}
BASE = {"trainer": {"steps": 5, "save_every": 2}, "rollout": {"prompts_per_step": 2}}
CASES = {
    "text-everything": (
        "text",
        {
            "method": {"id": "grpo", "regulariser": {"kl": {"coefficient": 0.1}}},
            "model": {"reference": "copy"},
            "rewards": [f"{REWARDS}:noisy"],
            "eval": {"every": 3},
            "trainer": {
                "ema_decay": 0.9, "minibatches": 2, "epochs": 2, "micro_batch_size": 3,
                "lr_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
            },
        },
    ),
    "text-lora": ("text", {"method": "dapo", "rewards": [f"{REWARDS}:rarely"], **LORA}),
    "text-bfloat16": ("text", {"model": {"dtype": "bfloat16"}}),
    "text-ema-reference": ("text", {"method": "grpo", "model": {"reference": "ema"}}),
    "vision-full": ("vision", {"method": "remax"}),
    "vision-lora": ("vision", LORA),
    "image-full": ("image", {"method": "flow-grpo"}),
    "image-averaged-old": ("image", {"method": "diffusion-nft"}),
    "image-checkpoint-bank": (
        "image",
        {"method": {"id": "seppo", "reference": {"every": 1, "size": 2}}, "seed": 3},
    ),
    "image-lora": ("image", {"method": "dance-grpo", "trainer": {"minibatches": 2}, **LORA}),
}  # fmt: skip


class Killed(BaseException):
    """Ends a run where it stands, as kill -9 does: nothing on the way out may save."""


def case_document(models, name, run_dir):
    modality, changes = CASES[name]
    doc = document(models, modality, run_dir, **merged(BASE, changes))
    if "eval" in changes:
        doc["data"]["eval"] = doc["data"]["train"].replace("train.jsonl", "eval.jsonl")
    return doc


def train(doc):
    return build.train(load_config(doc))


def same(one, other):
    assert metrics_of(one) == metrics_of(other)
    assert weight_bytes(one) == weight_bytes(other)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Run directories of uninterrupted runs, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / name
            train(case_document(models, name, made[name]))
        return made[name]

    return get


@pytest.fixture
def kill_after_line(monkeypatch):
    """Let the process die right after the metrics of a step are written."""
    log = loop._log

    def arm(step):
        def log_and_die(parts, metrics, number):
            log(parts, metrics, number)
            if number == step:
                monkeypatch.setattr(loop, "_log", log)
                raise Killed

        monkeypatch.setattr(loop, "_log", log_and_die)

    return arm


def cut_off(doc, arm, step):
    arm(step)
    with pytest.raises(Killed):
        train(doc)
    # Whatever the next process would have in its own generators:
    random.seed(step)
    torch.manual_seed(step + 1)


@pytest.mark.parametrize("name", CASES)
def test_cut_off_after_a_step_and_run_again(models, tmp_path, kill_after_line, whole, name):
    doc = case_document(models, name, tmp_path / "cut")
    cut_off(doc, kill_after_line, 1)  # before the first checkpoint
    cut_off(doc, kill_after_line, 4)  # between the line and its checkpoint
    train(doc)
    same(whole(name), tmp_path / "cut")
    assert len(metrics_of(tmp_path / "cut")) == 5 + ("eval" in doc["data"])


def test_what_a_kill_leaves_half_written_is_put_right(models, tmp_path, kill_after_line, whole):
    doc = case_document(models, "text-lora", tmp_path / "cut")
    cut_off(doc, kill_after_line, 3)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "loss": 0.')
    partial = tmp_path / "cut" / "checkpoints" / ".step_000004.partial"
    partial.mkdir()
    (partial / "state.json").write_text('{"state": {"step')
    (tmp_path / "cut" / ".config.yaml.partial").write_text("moda")
    train(doc)
    same(whole("text-lora"), tmp_path / "cut")
    names = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert sorted(names) == ["step_000004", "step_000005"]


@pytest.mark.parametrize("place", ["save_file", "_sync", "_write_json"])
def test_killed_while_a_checkpoint_is_written(models, tmp_path, monkeypatch, whole, place):
    doc = case_document(models, "text-lora", tmp_path / "cut")
    real, calls = getattr(checkpoint, place), []

    def die(*arguments):
        calls.append(1)
        if len(calls) == (4 if place == "_write_json" else 2):
            real(*arguments)
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, place, die)
        with pytest.raises(Killed):
            train(doc)
    complete = [path.name for path in (tmp_path / "cut" / "checkpoints").glob("step_*")]
    assert complete == ["step_000002"]
    train(doc)
    same(whole("text-lora"), tmp_path / "cut")


def test_a_full_disk_leaves_the_earlier_checkpoint(models, tmp_path, monkeypatch, whole):
    doc = case_document(models, "text-lora", tmp_path / "run")
    real, calls = checkpoint.save_file, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(MmgrpoError, match=r"step_000004 could not be written.*No space"):
            train(doc)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    train(doc)
    same(whole("text-lora"), tmp_path / "run")


def test_a_finished_run_stays_as_it_is_and_more_steps_continue_it(models, tmp_path):
    doc = case_document(models, "text-lora", tmp_path / "run")
    metrics = train(doc)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/checkpoints").rglob("*")}
    again = train(doc)
    assert again == metrics
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run/checkpoints").rglob("*")} == before
    assert len(metrics_of(tmp_path / "run")) == 5
    longer = merged(doc, {"trainer": {"steps": 7}})
    train(longer)
    train(merged(longer, {"run_dir": str(tmp_path / "whole")}))
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("forgotten", ["exp_avg", "ema", "reference", "generators"])
def test_the_end_depends_on_everything_that_is_restored(
    models, tmp_path, kill_after_line, monkeypatch, whole, forgotten
):
    doc = case_document(models, "text-everything", tmp_path / "cut")
    cut_off(doc, kill_after_line, 5)
    load = checkpoint.load_file

    def load_blurred(path):
        return {
            name: value * 1.01 if f"{forgotten}/" in name and value.is_floating_point() else value
            for name, value in load(path).items()
        }

    monkeypatch.setattr(checkpoint, "load_file", load_blurred)
    if forgotten == "generators":
        monkeypatch.setattr(checkpoint, "set_random_state", lambda state: None)
    train(doc)
    assert weight_bytes(tmp_path / "cut") != weight_bytes(whole("text-everything"))


# -- real processes -----------------------------------------------------------------------------


def kill_at(process, run_dir, step):
    """SIGKILL as soon as metrics.jsonl has reached a step."""
    file, deadline = Path(run_dir) / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and f'"step": {step},' in file.read_text():
            break
        time.sleep(0.005)
    assert process.poll() is None, finish(process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)


def check_killed_process(models, tmp_path, whole, name, steps):
    config = write_config(tmp_path / "run.yaml", case_document(models, name, tmp_path / "cut"))
    for step in steps:
        kill_at(command("train", config), tmp_path / "cut", step)
    code, out, err = finish(command("train", config))
    assert code == 0, out + err
    same(whole(name), tmp_path / "cut")


def test_kill_9_of_a_real_process(models, tmp_path, whole):
    check_killed_process(models, tmp_path, whole, "text-everything", [random.randint(3, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kill_9_of_a_real_process_thrice(models, tmp_path, whole, name):
    check_killed_process(models, tmp_path, whole, name, [1, 3, 4])


@pytest.mark.slow
def test_two_killed_processes(models, tmp_path):
    from test_two_processes import torchrun

    configs = {}
    for name in ("whole", "cut"):
        doc = case_document(models, "text-everything", tmp_path / name)
        configs[name] = write_config(tmp_path / f"{name}.yaml", doc)
    arguments = ("-m", "mmgrpo", "train")
    kill_at(torchrun(*arguments, configs["cut"]), tmp_path / "cut", 4)
    for name in ("whole", "cut"):
        code, out, err = finish(torchrun(*arguments, configs[name]))
        assert code == 0, out + err
    same(tmp_path / "whole", tmp_path / "cut")
    last = tmp_path / "cut" / "checkpoints" / "step_000005"
    one, two = (json.loads((last / f"random_{rank}.json").read_text()) for rank in (0, 1))
    assert one["python"] != two["python"]
