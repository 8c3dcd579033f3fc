"""A file and overrides become a checked configuration, or every error is told at once."""

from collections import Counter
from pathlib import Path

import pytest

from mmgrpo.config import dump_config, load_config
from mmgrpo.config.explain import known_keys
from mmgrpo.config.modalities import MODALITIES
from mmgrpo.config.paths import config_name, find_config, packaged_configs
from mmgrpo.errors import ConfigError
from mmgrpo.registry import TRACKERS

TEXT = """\
modality: text
model: {path: model}
data: {train: train.jsonl}
rewards: exact_answer
trainer: {steps: 3, learning_rate: 1e-5}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a valid text configuration, which is not the current one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "run.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "there" / "run.yaml"


def errors_of(source, *overrides):
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


def write(run, text):
    run.write_text(text)
    return run


def test_defaults_are_filled_in(run):
    config = load_config(run)
    assert config.method.id == "grpo"
    assert config.run_dir == "runs/run"
    assert config.rollout.group_size == 8
    assert config.trainer.learning_rate == 1e-5
    assert config.resume == "auto"
    assert [reward.model_dump() for reward in config.rewards] == [
        {"name": "exact_answer", "weight": 1.0, "options": {}}
    ]


def test_a_configuration_cannot_be_changed(run):
    with pytest.raises(ValueError, match="frozen"):
        load_config(run).seed = 3


def test_a_mapping_is_read_like_a_file_and_left_alone(run):
    config = load_config(run, ["seed=4"])
    mapping = config.model_dump()
    assert load_config(mapping) == config
    assert load_config(mapping, ["trainer.steps=9"]).trainer.steps == 9
    assert mapping == config.model_dump()


# -- overrides ----------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_wins(run):
    config = load_config(run, ["seed=1", "seed=2", "rollout.stop=['a=b', c]", "data.eval=null"])
    assert config.seed == 2
    assert config.rollout.stop == ["a=b", "c"]
    assert config.data.eval is None


def test_overrides_reach_into_lists_and_make_sections(run):
    config = load_config(
        run, ["rewards=[a, {name: b, tag: x}]", "rewards.1.weight=3", "model.lora.rank=4"]
    )
    assert [reward.weight for reward in config.rewards] == [1.0, 3]
    assert config.rewards[1].options == {"tag": "x"}
    assert config.model.lora.rank == 4
    assert config.model.lora.alpha == 8.0


def test_the_method_is_swapped_and_its_options_changed(run):
    assert load_config(run, ["method=dapo"]).method.model_dump() == {"id": "dapo"}
    changed = load_config(run, ["method.advantage.scale=batch"]).method
    assert (changed.id, changed.overrides) == ("grpo", {"advantage": {"scale": "batch"}})
    both = load_config(run, ["method.advantage.scale=none", "method=dapo"]).method
    assert (both.id, both.overrides) == ("dapo", {"advantage": {"scale": "none"}})


def test_swapping_the_method_drops_the_options_of_the_old_one(run):
    write(run, TEXT + "method: {id: grpo, advantage: {scale: batch}}\n")
    assert load_config(run, ["method=dapo"]).method.overrides == {}
    assert load_config(run, ["method.id=dapo"]).method.overrides == {
        "advantage": {"scale": "batch"}
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "command line: 'seed' should have the form key.sub=value"),
        ("=3", "command line: '=3' should have the form key.sub=value"),
        ("a..b=3", "command line: 'a..b=3' should have the form key.sub=value"),
        ("seed=[", "command line: seed:1: not valid YAML: expected the node content"),
        ("modality.x=3", "command line: modality.x leads into 'text', which has no keys"),
        ("rewards.0.weight=3", "command line: rewards.0 leads into 'exact_answer'"),
        ("seed=x", "command line: seed should be a valid integer, got 'x'"),
        ("trainer.lr=3", "command line: trainer.lr is not a known key"),
        ("method=dapoo", "command line: unknown method 'dapoo'; did you mean 'dapo'?"),
    ],
)
def test_a_wrong_override_is_named(run, override, message):
    lines = errors_of(run, override)
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_an_override_outside_a_list_is_named(run):
    assert errors_of(run, "rewards=[a]", "rewards.2.weight=1") == [
        "command line: rewards.2 is not one of the 1 list items"
    ]


# -- errors -------------------------------------------------------------------------------------


def mistakes():
    """Rows of mistakes.txt: a line of YAML, and how each line about it starts."""
    rows = (Path(__file__).parent / "mistakes.txt").read_text().splitlines()
    return [row.split(" => ") for row in rows]


@pytest.mark.parametrize("mistake", mistakes(), ids=lambda mistake: mistake[0])
def test_each_mistake_has_a_line_that_says_where_and_what(run, mistake):
    text, *lines = mistake
    key = text.partition(":")[0]
    kept = [line for line in TEXT.splitlines() if not line.startswith(key + ":")]
    found = errors_of(write(run, "\n".join([*kept, text])))
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(f"{run}:{len(kept) + 1}: {expected}")


def test_all_mistakes_are_told_at_once(run):
    write(run, "modality: text\nmethod: flow-grpo\nmodel: {path: 3}\nzzz: 1\ndata: {train: x}\n")
    found = errors_of(run, "data.limt=1")
    assert len(found) == 6
    for key in ("model.path", "rewards is", "trainer is", "zzz", "data.limt", "flow-grpo"):
        assert sum(key in line for line in found) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: should be a mapping of keys to values, got None"),
        ("- a", "run.yaml: should be a mapping"),
        ("seed: 1", "run.yaml: modality is required: text, vision, image"),
        ("\nmodality: image_", "run.yaml:2: unknown modality 'image_'; did you mean 'image'?"),
        ("modality: [text]", "run.yaml:1: unknown modality ['text']; did you mean 'text'?"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_named(run, text, message):
    (line,) = errors_of(write(run, text))
    assert line.removeprefix(f"{run.parent}/").startswith(message)


def test_the_file_is_shown_as_the_user_would_write_it(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert errors_of("run.yaml", "data=null")[0].startswith("command line: data should be")
    write(run, "modality: texx")
    assert errors_of("run.yaml")[0].startswith("run.yaml:1: ")


def test_a_file_that_cannot_be_read_is_named(run):
    run.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in errors_of(run)[0]


def test_an_unknown_name_suggests_a_packaged_configuration():
    assert errors_of("quikstart/text") == [
        "no configuration file 'quikstart/text'; did you mean 'quickstart/text'?"
    ]


# -- paths --------------------------------------------------------------------------------------


def test_paths_are_found_from_here_first_and_then_beside_the_file(run):
    here, there = Path.cwd(), run.parent
    for folder in (here, there):
        (folder / "model").mkdir()
    (there / "train.jsonl").write_text("")
    config = load_config(run)
    assert config.model.path == str(here / "model")
    assert config.data.train == str(there / "train.jsonl")


def test_what_does_not_exist_is_kept_as_written(run):
    config = load_config(run, ["model.path=Qwen/Qwen2.5-7B", "rewards=pkg.mod:score"])
    assert config.model.path == "Qwen/Qwen2.5-7B"
    assert config.rewards[0].name == "pkg.mod:score"


def test_paths_in_rewards_are_found(run):
    (run.parent / "mine.py").write_text("")
    (run.parent / "judge").mkdir()
    write(run, TEXT + "eval: {judge: {name: 'mine.py:score', path: ./judge, column: judge}}\n")
    judge = load_config(run).eval.judge
    assert judge.name == f"{run.parent / 'mine.py'}:score"
    assert judge.options == {"path": str(run.parent / "judge"), "column": "judge"}


# -- the shipped files --------------------------------------------------------------------------


@pytest.mark.parametrize("file", packaged_configs(), ids=config_name)
def test_every_shipped_configuration_loads_and_is_short(file):
    config = load_config(file)
    text = file.read_text()
    assert text.startswith("# ")
    assert "Hardware:" in text
    assert len(text.splitlines()) < 40
    assert find_config(config_name(file)) == file
    assert find_config(f"configs/{config_name(file)}.yaml") == file
    assert load_config(config_name(file)) == config


@pytest.mark.parametrize("file", packaged_configs(), ids=config_name)
def test_what_is_dumped_loads_again_unchanged(file, tmp_path):
    config = load_config(file, ["method.advantage.eps=1e-6"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_trackers_are_those_of_the_registry(run):
    names = ", ".join(TRACKERS)
    assert load_config(run, [f"tracking.trackers=[{names}]"]).tracking.trackers == [*TRACKERS]
    (line,) = errors_of(run, "tracking.trackers=[wandb, tensorbord]")
    assert line.endswith("got 'tensorbord'; did you mean 'tensorboard'?")
    assert all(name in line for name in TRACKERS)


# -- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", MODALITIES.values(), ids=MODALITIES)
def test_a_configuration_stays_small(schema):
    keys = set(known_keys(schema))
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    inner = ("model.lora.", "eval.judge.", "rewards.", "rollout.engine.", "speed.")
    assert len({key for key in leaves if not key.startswith(inner)}) + len(inner) <= 52


@pytest.mark.parametrize("schema", MODALITIES.values(), ids=MODALITIES)
def test_every_section_stays_small(schema):
    sizes = Counter(key.rpartition(".")[0] for key in known_keys(schema))
    assert max(sizes.values()) <= 16
