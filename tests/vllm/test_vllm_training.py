"""Training with vLLM: in this process, through a server, and through a server that is killed."""

import json
import time

import pytest
from fixtures_runs import command, finish
from vllm_server import Server

from mmgrpo.build import train
from mmgrpo.config import load_config
from mmgrpo.tracking import read_metrics

pytestmark = pytest.mark.vllm


def check_learnt(run_dir):
    rows = read_metrics(run_dir / "metrics.jsonl")
    success = [row["eval/success"] for row in rows if "eval/success" in row]
    assert success[-1] >= 0.9
    assert success[-1] >= success[0] + 0.3
    for row in rows[1:]:
        assert 0 <= row["mismatch/kl"] < 1e-8
        assert row["mismatch/ratio_max"] == pytest.approx(1, abs=1e-2)
        assert row["mismatch/ratio_p50"] == pytest.approx(1, abs=1e-4)
        assert row["ratio/first_max_deviation"] < 1e-3
        assert row["entropy"] >= 0
    newest = max(run_dir.glob("samples/step_*[0-9].jsonl"))
    samples = [json.loads(line) for line in newest.read_text().splitlines()]
    assert all(sample["mismatch"][0]["token"] for sample in samples)


def test_the_playground_is_learnt_in_process(tmp_path):
    train(load_config("quickstart/text", [f"run_dir={tmp_path}/run", "rollout.engine=vllm"]))
    check_learnt(tmp_path / "run")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    server = Server("quickstart/text", log=log)
    yield server
    server.kill()


def test_the_playground_is_learnt_through_a_server(server, tmp_path):
    train(load_config("quickstart/text", [f"run_dir={tmp_path}/run", server.engine]))
    check_learnt(tmp_path / "run")


def test_a_killed_server_is_named_and_the_run_continues(server, tmp_path):
    run, judge = tmp_path / "run", tmp_path / "kill_after.py"
    started = tmp_path / "third_step"
    judge.write_text(
        "from pathlib import Path\n"
        "import time\n\n\n"
        "def reward(completions, answer, **_):\n"
        f"    calls = Path({str(started)!r})\n"
        "    count = len(calls.read_text()) if calls.exists() else 0\n"
        "    calls.write_text('x' * (count + 1))\n"
        "    while count == 2 and not Path(str(calls) + '.killed').exists():\n"
        "        time.sleep(0.1)\n"
        "    return [float(gold in text) for text, gold in zip(completions, answer)]\n"
    )
    arguments = (
        "train", "quickstart/text", server.engine, f"run_dir={run}", f"rewards={judge}:reward",
        "data.eval=null", "trainer.steps=5", "rollout.prompts_per_step=4",
    )  # fmt: skip
    process = command(*arguments)
    while process.poll() is None and not (started.exists() and len(started.read_text()) == 3):
        time.sleep(0.1)
    server.kill()
    started.with_name(f"{started.name}.killed").touch()
    code, _, err = finish(process)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert server.url in line
    assert "does not answer" in line
    assert "training continues from its last checkpoint" in line
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert (run / "checkpoints" / "step_000003").is_dir()
    server.start()
    code, _, err = finish(command(*arguments))
    assert (code, err) == (0, err)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["mismatch/kl"] < 1e-8 for row in rows)
