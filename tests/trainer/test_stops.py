"""Ctrl-C, SIGTERM and rewards that fail: the run ends as it should and can be continued."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
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
from mmgrpo.cli.main import main
from mmgrpo.config import load_config
from mmgrpo.errors import Interrupted, MmgrpoError, RewardError
from mmgrpo.trainer import loop

BASE = {"trainer": {"steps": 4}, "rollout": {"prompts_per_step": 2}, "model": {"lora": {"rank": 2}}}


def text(models, run_dir, **changes):
    return document(models, "text", run_dir, **merged(BASE, changes))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    build.train(load_config(text(models, run_dir)))
    return run_dir


def same(one, other):
    assert metrics_of(one) == metrics_of(other)
    assert weight_bytes(one) == weight_bytes(other)


def during(monkeypatch, step, act):
    """Call ``act`` in the middle of a step, once."""
    real = loop.train_step

    def train_step(parts, state, config):
        collected = real(parts, state, config)
        if state.step == step:
            monkeypatch.setattr(loop, "train_step", real)
            act()
        return collected

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(models, tmp_path, monkeypatch, whole, number):
    doc = text(models, tmp_path / "run")
    before = signal.getsignal(number)
    during(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=r"after step 2; saved in .*continues"):
        build.train(load_config(doc))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
    assert signal.getsignal(number) == before
    build.train(load_config(doc))
    same(whole, tmp_path / "run")


def test_a_second_control_c_stops_at_once(models, tmp_path, monkeypatch, whole):
    doc = text(models, tmp_path / "run", trainer={"save_every": 1})

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    during(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        build.train(load_config(doc))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]
    build.train(load_config(doc))
    same(whole, tmp_path / "run")


def test_control_c_before_the_first_step_has_nothing_to_save(models, tmp_path, monkeypatch):
    doc = text(models, tmp_path / "run")
    doc["data"]["eval"] = doc["data"]["train"]
    evaluate = loop._evaluate

    def interrupted(parts, state):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(parts, state)

    monkeypatch.setattr(loop, "_evaluate", interrupted)
    with pytest.raises(Interrupted, match="before the first step"):
        build.train(load_config(doc))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_control_c_during_the_last_step_changes_nothing(models, tmp_path, monkeypatch, whole):
    during(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    build.train(load_config(text(models, tmp_path / "run")))
    same(whole, tmp_path / "run")


def test_training_in_another_thread_leaves_the_signals_alone(models, tmp_path, whole):
    config = load_config(text(models, tmp_path / "run"))
    thread = threading.Thread(target=build.train, args=(config,))
    thread.start()
    thread.join(60)
    same(whole, tmp_path / "run")


def test_control_c_of_a_real_process(models, tmp_path):
    """Enough steps that one is running when the signal arrives."""
    doc = text(models, tmp_path / "run", trainer={"steps": 2000})
    config = write_config(tmp_path / "run.yaml", doc)
    process, file = command("train", config), tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and '"step": 3' in file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, out + err
    assert "Traceback" not in err
    last = metrics_of(tmp_path / "run")[-1]["step"]
    assert f"error: interrupted after step {last}; saved in {tmp_path / 'run'}" in err
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}" / "state.json").is_file()


# -- rewards that fail --------------------------------------------------------------------------


def test_a_reward_that_fails_leaves_everything_up_to_it(models, tmp_path, monkeypatch, capsys):
    rewards = {"rewards": [f"{REWARDS}:fails_in_the_third_step"]}
    reference = text(models, tmp_path / "whole", **rewards)
    build.train(load_config(reference))
    monkeypatch.setenv("FAIL_WITH", str(tmp_path / "run" / "metrics.jsonl"))
    config = write_config(tmp_path / "run.yaml", text(models, tmp_path / "run", **rewards))
    assert main(["train", str(config)]) == 1
    err = capsys.readouterr().err
    assert "'fails_in_the_third_step' failed" in err
    assert "at step 3" in err
    assert "the judge's server is down" in err
    (saved,) = (tmp_path / "run" / "failed_rewards").glob("*.json")
    record = json.loads(saved.read_text())
    assert record["step"] == 3
    assert record["samples"][0]["completion"] is not None
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_000002"]
    monkeypatch.delenv("FAIL_WITH")
    assert main(["train", str(config)]) == 0
    same(tmp_path / "whole", tmp_path / "run")


def test_a_failure_after_the_weights_moved_saves_nothing(models, tmp_path, monkeypatch):
    doc = text(models, tmp_path / "run", trainer={"minibatches": 2})
    real, calls = build.Optimizer.step, []

    def step(self, rate):
        calls.append(rate)
        if len(calls) == 4:  # the second half of the second step
            raise MmgrpoError("broken")
        real(self, rate)

    monkeypatch.setattr(build.Optimizer, "step", step)
    with pytest.raises(MmgrpoError, match="broken"):
        build.train(load_config(doc))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_gradient_that_is_not_finite_moves_nothing(models, tmp_path, monkeypatch, whole):
    doc = text(models, tmp_path / "run")
    parts = build.assemble(load_config(doc))
    loss, calls = parts.method.loss, []

    class Broken:
        def __getattr__(self, name):
            return getattr(method, name)

        def loss(self, *arguments, **options):
            calls.append(1)
            output = loss(*arguments, **options)
            factor = float("nan") if len(calls) == 3 else 1.0
            return type(output)(output.loss * factor, output.metrics, output.max_log_ratio)

    method, parts.method = parts.method, Broken()
    with pytest.raises(MmgrpoError, match="the gradient is not finite"):
        build.run(parts, load_config(doc))
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_000002"]
    build.train(load_config(doc))
    same(whole, tmp_path / "run")


def test_dropped_samples_are_counted_and_not_trained(models, tmp_path):
    doc = text(
        models, tmp_path / "run", rewards=[f"{REWARDS}:broken_for_some"], reward_failure="drop",
        rollout={"group_size": 8},
    )  # fmt: skip
    build.train(load_config(doc))
    rows = metrics_of(tmp_path / "run")
    assert sum(row["count/dropped_samples"] for row in rows) > 0
    assert all(row["reward/mean"] >= 0.2 for row in rows)
    assert list((tmp_path / "run" / "failed_rewards").glob("*.json"))


def test_a_greedy_baseline_that_fails_takes_its_group_out(models, tmp_path):
    rewards = [f"{REWARDS}:broken_for_many", f"{REWARDS}:spread"]
    doc = text(
        models, tmp_path / "run", method="remax", rewards=rewards, reward_failure="drop",
        rollout={"prompts_per_step": 12},
    )  # fmt: skip
    config = load_config(doc)
    parts = build.assemble(config)
    from mmgrpo.trainer.metrics import Report
    from mmgrpo.trainer.parts import State
    from mmgrpo.trainer.step import collect, credit

    collected = collect(parts, State(), config, Report())
    failed = collected.trajectories.baseline_reward.isnan()
    assert failed.any()
    credited = credit(parts, collected.trajectories, config, Report())
    assert not credited.mask[failed].any()
    assert credited.mask[~failed].any(dim=1).all()


def test_a_failure_in_another_process_stops_this_one():
    from mmgrpo.core.collective import Collective
    from mmgrpo.trainer.distributed import together

    class Two(Collective):
        def sum(self, value):
            return value + 1

    with pytest.raises(RewardError, match="another process"):
        together(Two(), lambda: 1)


@pytest.mark.slow
def test_control_c_of_two_processes(models, tmp_path):
    """The launcher forwards signals; every rank has to stop after the same step."""
    from test_two_processes import torchrun

    doc = text(models, tmp_path / "run", trainer={"steps": 5000})
    config = write_config(tmp_path / "run.yaml", doc)
    process, file = torchrun("-m", "mmgrpo", "train", config), tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and '"step": 3' in file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert code != 0
    last = metrics_of(tmp_path / "run")[-1]["step"]
    assert f"interrupted after step {last}" in err, out + err
    saved = Path(tmp_path / "run" / "checkpoints" / f"step_{last:06d}")
    assert {p.name for p in saved.glob("random_*.json")} == {"random_0.json", "random_1.json"}


# -- budgets ------------------------------------------------------------------------------------


def test_a_budget_of_decisions_ends_the_run_and_more_continues_it(models, tmp_path, whole):
    spent = [row["count/generated_decisions"] for row in metrics_of(whole)]
    run_dir = tmp_path / "run"
    limited = text(models, run_dir, trainer={"max_decisions": int(spent[0]) + 1})
    build.train(load_config(limited))
    assert [row["step"] for row in metrics_of(run_dir)] == [1, 2]
    assert (run_dir / "checkpoints" / "step_000002").is_dir()
    build.train(load_config(text(models, run_dir)))
    same(whole, run_dir)


def test_a_budget_of_seconds_ends_the_run_after_a_step(models, tmp_path):
    run_dir = tmp_path / "run"
    build.train(load_config(text(models, run_dir, trainer={"max_seconds": 1e-9})))
    assert [row["step"] for row in metrics_of(run_dir)] == [1]
