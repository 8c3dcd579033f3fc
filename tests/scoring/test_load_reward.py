"""From names to callables: every way to name a reward, and every way to get it wrong."""

import inspect
from pathlib import Path

import pytest

from mmgrpo.errors import ConfigError, MissingResourceError
from mmgrpo.registry import load_target
from mmgrpo.rewards import REWARDS
from mmgrpo.scoring import check_modality, load_reward, load_rewards

HERE = Path(__file__).parent
FILE = str(HERE / "user_rewards.py")


def load(name, **options):
    return load_reward({"name": f"{FILE}:{name}", "options": options})


def error_of(spec):
    with pytest.raises(ConfigError) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- names ---------------------------------------------------------------------------------------


def test_a_name_of_the_package():
    reward = load_reward("exact_answer")
    assert reward.name == "exact_answer"
    assert reward.weight == 1.0
    assert reward.required_columns == {"answer"}
    assert reward.required_arguments == {"completions"}
    assert reward.fn(completions=["<answer>1</answer>"], answer=["1"]) == [1.0]


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_reward_of_the_package_loads_or_names_what_it_cannot_do_without(name):
    target = load_target(REWARDS[name])
    parameters = inspect.signature(target).parameters.values() if inspect.isclass(target) else ()
    required = [p.name for p in parameters if p.default is p.empty]
    if required:
        with pytest.raises(ConfigError, match=required[0]):
            load_reward(name)
        return
    missing = ""
    try:
        assert load_reward(name).name == name
    except MissingResourceError as error:  # a program that is not installed here
        missing = str(error)
    assert not missing or missing.startswith(f"{name}: ")


def test_a_file_and_a_function():
    reward = load("plain")
    assert reward.name == "plain"
    assert reward.required_columns == {"answer"}
    assert reward.fn(prompts=[""], completions=["1"], answer=["1"]) == [1.0]


def test_a_file_is_imported_once():
    assert load("plain").fn.func is load("plain").fn.func


def test_a_module_and_a_function():
    assert load_reward("mmgrpo.rewards.tag_format:tag_format").name == "tag_format"


def test_a_callable_and_a_lambda():
    assert load_reward(lambda completions: [1.0]).fn(completions=["x"]) == [1.0]
    assert load_reward({"name": len, "weight": 2}).weight == 2.0


def test_a_class_takes_its_options_and_is_called():
    reward = load("Bonus", amount=2, unit=3)
    assert reward.name == "Bonus"
    assert reward.required_columns == {"level"}
    assert reward.fn(completions=["x"], level=[1]) == [7]


def test_weights_and_repeated_names():
    rewards = load_rewards(["tag_format", {"name": "tag_format", "weight": 0.5}, "exact_answer"])
    assert [(r.name, r.weight) for r in rewards] == [
        ("tag_format", 1.0),
        ("tag_format_2", 0.5),
        ("exact_answer", 1.0),
    ]
    assert [r.name for r in load_rewards("tag_format")] == ["tag_format"]


# -- options and columns -------------------------------------------------------------------------


def test_options_are_bound_and_columns_cannot_overwrite_them():
    reward = load("with_options", scale=3)
    assert reward.required_columns == {"answer"}
    assert reward.fn(completions=["1"], answer=["1"]) == [3.0]
    assert not reward.takes("scale")
    assert not reward.takes("offset")  # keyword-only: an option, though it was not given
    assert reward.takes("answer")
    assert not reward.takes("other")


def test_a_parameter_with_a_default_is_an_optional_column():
    reward = load("optional_column")
    assert reward.required_columns == set()
    assert reward.takes("hint")


def test_keyword_columns_take_everything_but_options():
    reward = load_reward({"name": "exact_answer", "options": {"tag": "a"}})
    assert reward.takes("whatever")
    assert not reward.takes("case_sensitive")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("exact_anser", "did you mean 'exact_answer'?"),
        ("zzz", "valid: classifier_score"),
        (f"{FILE}:plane", "did you mean 'plain'?"),
        (f"{FILE}:NUMBER", "no function 'NUMBER'"),
        (str(HERE / "user_reward.py") + ":plain", "did you mean 'user_rewards.py'?"),
        (str(HERE / "broken_reward_file.py") + ":f", "RuntimeError: broken file"),
        ("no_such_module_at_all:f", "cannot import module 'no_such_module_at_all'"),
        ({"name": "exact_answer", "options": {"tga": "a"}}, "did you mean 'tag'?"),
        ({"name": "exact_answer", "options": {"answer": "a"}}, "unknown option 'answer'"),
        ({"name": "exact_answer", "options": {"completions": "a"}}, "unknown option"),
        ({"name": f"{FILE}:plain", "options": {"a": 1}}, "it has no options"),
        ({"name": f"{FILE}:Bonus"}, "missing option 'amount'"),
        ({"name": f"{FILE}:Bonus", "options": {"amount": 1, "unt": 2}}, "did you mean 'unit'?"),
        ({"name": f"{FILE}:Bonus", "options": {"amount": -1}}, "must not be negative"),
        (f"{FILE}:NotCallable", "has no __call__"),
        ({"name": "exact_answer", "wieght": 1}, "did you mean 'weight'?"),
        ({"name": "exact_answer", "weight": float("nan")}, "finite number"),
        ({"name": "exact_answer", "weight": "1"}, "finite number"),
        ({"weight": 1}, "'name' must be text"),
        (5, "must be a name, a callable or a mapping"),
        ({"name": "length_penalty", "options": {"max_length": 4, "buffer": 9}}, "buffer"),
        ({"name": "classifier_score", "options": {"path": "nowhere"}}, "not a model folder"),
    ],
)
def test_a_wrong_specification_is_one_clear_sentence(spec, expected):
    assert expected in error_of(spec)


def test_a_module_in_the_working_folder_suggests_the_file_form(monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text("def plain(completions): ...")
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'only_here.py:plain'?" in error_of("only_here:plain")


def test_rewards_must_fit_the_modality():
    with pytest.raises(ConfigError, match="'exact_answer' asks for completions"):
        check_modality(load_reward("exact_answer"), "image")
    with pytest.raises(ConfigError, match="asks for images"):
        check_modality(load_reward(lambda images: [0.0]), "text")
    check_modality(load_reward("exact_answer"), "text")
    check_modality(load_reward(lambda images: [0.0]), "image")
    check_modality(load_reward(lambda images, completions: [0.0]), "vision")
