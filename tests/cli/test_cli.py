"""The command line: what it calls, what it prints and how it ends."""

import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer

import mmgrpo
from mmgrpo.cli.main import app, main
from mmgrpo.config import list_presets, load_config
from mmgrpo.config.modalities import MODALITIES
from mmgrpo.config.paths import config_name, packaged_configs
from mmgrpo.errors import DataError, Interrupted, MissingExtraError, RewardError

RUN = """\
modality: text
model: {path: model}
data: {train: train.jsonl}
rewards: exact_answer
trainer: {steps: 3, learning_rate: 1e-5}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, holding one configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


@pytest.fixture
def build(monkeypatch):
    """A stand-in for mmgrpo.build that remembers its calls."""
    calls = []

    def remember(name, answer=None):
        def stand_in(*arguments):
            calls.append((name, *arguments))
            return answer

        return stand_in

    fake = SimpleNamespace(
        calls=calls,
        train=remember("train"),
        plan=remember("plan", "the plan: 3 steps"),
        evaluate=remember("evaluate", {"eval/success": 0.75, "eval/length": 1234.5}),
        sample=remember("sample"),
    )
    monkeypatch.setitem(sys.modules, "mmgrpo.build", fake)
    monkeypatch.setattr(mmgrpo, "build", fake, raising=False)
    return fake


def test_train_loads_overrides_and_trains(folder, build):
    assert main(["train", "run.yaml", "seed=7", "method=dapo"]) == 0
    assert build.calls == [("train", load_config("run.yaml", ["seed=7", "method=dapo"]))]


def test_a_dry_run_shows_configuration_and_plan_and_writes_nothing(folder, build, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["train", "run.yaml", "seed=7", "--dry-run"]) == 0
    assert [call[0] for call in build.calls] == ["plan"]
    shown, _, plan = capsys.readouterr().out.partition("the plan")
    assert plan == ": 3 steps\n"
    assert sorted(folder.rglob("*")) == before
    (folder / "shown.yaml").write_text(shown)
    assert load_config("shown.yaml") == load_config("run.yaml", ["seed=7"])


@pytest.mark.parametrize("file", packaged_configs(), ids=config_name)
def test_every_shipped_configuration_has_a_plan(folder, capsys, file):
    before = sorted(folder.rglob("*"))
    assert main(["train", config_name(file), "--dry-run"]) == 0
    assert load_config(file).method.id in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before


def test_eval_shows_the_numbers(folder, build, capsys):
    assert main(["eval", "run.yaml", "--checkpoint", "runs/x", "eval.prompts=2"]) == 0
    ((name, config, checkpoint),) = build.calls
    assert (name, config.eval.prompts, str(checkpoint)) == ("evaluate", 2, "runs/x")
    shown = capsys.readouterr().out
    assert "eval/success" in shown
    assert "0.75" in shown


def test_sample_names_the_folder_it_wrote(folder, build, capsys):
    assert main(["sample", "run.yaml", "--checkpoint", "runs/x", "--out", "here"]) == 0
    ((name, _, checkpoint, out),) = build.calls
    assert (name, str(checkpoint), str(out)) == ("sample", "runs/x", "here")
    assert capsys.readouterr().out == "here\n"


# -- endings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("train.jsonl:3: not JSON"), 2),
        (MissingExtraError("diffusers", "image"), 2),
        (RewardError("the reward returned NaN"), 1),
        (Interrupted("stopped after step 3"), 130),
    ],
)
def test_an_error_of_ours_is_one_line_and_a_code(folder, build, capsys, error, code):
    build.train = raises(error)
    assert main(["train", "run.yaml"]) == code
    shown = capsys.readouterr()
    assert shown.err == f"error: {error}\n"
    assert shown.out == ""


def test_control_c_outside_the_loop_ends_with_130(folder, build):
    build.train = raises(KeyboardInterrupt())
    assert main(["train", "run.yaml"]) == 130


def test_any_other_error_keeps_its_traceback(folder, build):
    build.train = raises(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["train", "run.yaml"])


def raises(error):
    def stand_in(*_):
        raise error

    return stand_in


@pytest.mark.parametrize("command", ["train", "eval", "sample"])
def test_a_wrong_key_ends_with_2_and_touches_nothing(folder, build, capsys, command):
    options = {
        "train": [],
        "eval": ["--checkpoint", "x"],
        "sample": ["--checkpoint", "x", "--out", "y"],
    }
    before = sorted(folder.rglob("*"))
    assert main([command, "run.yaml", "trainer.lr=1", *options[command]]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: command line: trainer.lr is not a known key")
    assert len(shown.err.splitlines()) == 1
    assert build.calls == []
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["train", "run.yaml", "--dry"], ["sample", "run.yaml"]]
)
def test_wrong_usage_ends_with_2(folder, capsys, arguments):
    assert main(arguments) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["train", "--help"], ["--version"]])
def test_help_ends_with_0(capsys, arguments):
    assert main(arguments) == 0
    assert "mmgrpo" in capsys.readouterr().out


def test_the_process_ends_with_the_code(folder):
    result = subprocess.run(
        [sys.executable, "-m", "mmgrpo", "train", "run.yaml", "sed=1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: command line: sed is not a known key; did you mean 'seed'?\n"
    assert result.stdout == ""


def test_help_answers_within_a_second():
    def cpu_seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "mmgrpo", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 1


def test_the_surface_is_this():
    surface = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in typer.main.get_command(app).commands.items()
    }
    assert surface == {
        "train": {"config", "overrides", "--dry-run"},
        "eval": {"config", "overrides", "--checkpoint"},
        "sample": {"config", "overrides", "--checkpoint", "--out"},
        "serve": {"config", "overrides", "--dry-run"},
        "methods": {"method_id", "--json"},
        "build": {"task", "--out", "--seed"},
        "quickstart": {"overrides"},
        "compare": {
            "methods", "--task", "--seeds", "--steps", "--decisions", "--seconds", "--set", "--all",
            "--published", "--jobs", "--out", "--write",
        },
    }  # fmt: skip


# -- methods ------------------------------------------------------------------------------------


def test_methods_lists_every_preset_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["id"] for record in records] == list_presets()
    for record in records:
        assert set(record) == {
            "id", "title", "paper", "family", "modalities", "needs", "components",
        }  # fmt: skip
        assert record["modalities"]
        assert {*record["modalities"]} <= MODALITIES.keys()
        assert all(isinstance(need, str) for need in record["needs"])
        assert record["components"]
        assert "arXiv:" in record["paper"]


def test_one_method_is_a_list_of_one_as_json_and_readable_as_text(capsys):
    assert main(["methods", "grpo", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["id"] == "grpo"
    assert "ref_log_prob" in record["needs"]
    assert main(["methods", "grpo"]) == 0
    assert "arXiv:2402.03300" in capsys.readouterr().out


def test_methods_as_text_names_every_id(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in list_presets())


def test_an_unknown_method_ends_with_2(capsys):
    assert main(["methods", "drgrpo"]) == 2
    assert capsys.readouterr().err == "error: unknown method 'drgrpo'; did you mean 'dr-grpo'?\n"


# -- serve --------------------------------------------------------------------------------------


def test_serve_shows_vllm_s_command_and_does_not_load_it(folder):
    url = "rollout.engine={name: vllm, url: 'http://10.0.0.5:8123', options: {max_num_seqs: 64}}"
    code = (
        "import sys; from mmgrpo.cli.main import main; "
        f"code = main(['serve', 'run.yaml', '--dry-run', {url!r}]); "
        "print(code, 'vllm' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    environment, command, end = result.stdout.splitlines()
    assert end == "0 False"
    assert "VLLM_SERVER_DEV_MODE=1" in environment
    for flag in ("--host 10.0.0.5 --port 8123", "--max-num-seqs 64", "--dtype float32"):
        assert flag in command
    for flag in ("--worker-extension-cls", "--logprobs-mode processed_logprobs", "--model"):
        assert flag in command
    assert "--enable-lora" not in command


def test_serve_makes_room_for_the_adapter(folder, capsys):
    assert main(["serve", "run.yaml", "--dry-run", "model.lora.rank=20"]) == 0
    assert "--enable-lora --max-lora-rank 32" in capsys.readouterr().out


def test_serve_becomes_vllm(folder, monkeypatch):
    called = []
    monkeypatch.setattr("os.execve", lambda *arguments: called.append(arguments))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert main(["serve", "run.yaml"]) == 0
    ((program, command, environment),) = called
    assert program == command[0] == sys.executable
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "PATH" in environment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine={name: vllm, url: 'http://here'}", "expected http://host:port"),
        ("rollout.engine={name: vllm, options: {model: x}}", "options.model is given"),
        ("rollout.engine={name: native, url: 'http://h:1'}", "name is 'native'"),
    ],
)
def test_serve_refuses_what_cannot_be_served(folder, capsys, override, message):
    assert main(["serve", "run.yaml", override]) == 2
    assert message in capsys.readouterr().err


def test_serve_refuses_images_and_a_missing_vllm(folder, capsys, monkeypatch):
    assert main(["serve", "quickstart/image"]) == 2
    assert "expected text or vision" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "run.yaml"]) == 2
    assert "mmgrpo[vllm]" in capsys.readouterr().err
