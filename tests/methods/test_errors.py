"""A wrong name, type or combination is one clear sentence, found when the method is composed."""

import pytest
from method_batches import PRESETS, load_method

from mmgrpo.config.modalities import MODALITIES
from mmgrpo.config.presets import read_preset
from mmgrpo.errors import MethodError, UsageError
from mmgrpo.methods import Method
from mmgrpo.registry import COMPONENTS, names, resolve

UNKNOWN = [
    ("grpoo", {}, ["unknown method 'grpoo'", "did you mean 'grpo'?"]),
    ("dapo", {"advantge": {}}, ["unknown slot 'advantge'", "'advantage'"]),
    ("dapo", {"advantage.basline": "none"}, ["unknown option 'basline'", "'baseline'"]),
    ("dapo", {"advantage": {"baseline": "grup"}}, ["unknown baseline 'grup'", "'group'"]),
    ("dapo", {"advantage.scale": "bach"}, ["unknown scale 'bach'", "'batch'"]),
    ("dapo", {"trust_region.hihg": 0.3}, ["unknown option 'hihg'", "'high'"]),
    ("dapo", {"trust_region": "ppo_clp"}, ["unknown trust_region 'ppo_clp'", "'ppo_clip'"]),
    ("dapo", {"objective": "reinforc"}, ["unknown objective", "'reinforce'"]),
    ("dapo", {"aggregate": "token-mean"}, ["unknown aggregate", "'token_mean'"]),
    ("dapo", {"ratio": "sequnce"}, ["unknown ratio", "'sequence'"]),
    ("dapo", {"credit": "unifrm"}, ["unknown credit", "'uniform'"]),
    ("dapo", {"correction": "truncate"}, ["unknown correction", "'truncated'"]),
    ("dapo", {"filter": ["uniform_group"]}, ["unknown filter", "'uniform_groups'"]),
    ("dapo", {"reward.combine": "gdp"}, ["unknown combine", "'gdpo'"]),
    ("dapo", {"reward.shaping": ["clp"]}, ["unknown shaping", "'clip'"]),
    ("grpo", {"regulariser.kl.coeficient": 1}, ["unknown option 'coeficient'", "'coefficient'"]),
    ("grpo", {"regulariser.kl.estimator": "k4"}, ["regulariser.kl.estimator", "'k3'"]),
    ("grpo", {"regulariser.kl.target": "reff"}, ["regulariser.kl.target", "'ref'"]),
    ("grpo", {"regulariser.kl.gradient": "k9"}, ["regulariser.kl.gradient", "'k2'"]),
    ("rloo", {"reward.kl_placement": "sampel"}, ["reward.kl_placement", "'sample'"]),
    ("grpo", {"advantage.whiten": "token"}, ["advantage.whiten", "'decisions'"]),
    ("flow-grpo", {"rollout.kernel": "flow_sd"}, ["rollout.kernel", "'flow_sde'"]),
    ("flow-grpo", {"rollout.selection.kind": "all_but_lst"}, ["selection", "all_but_last"]),
    ("mixed", {}, ["unknown method 'mixed'", "valid:"]),
]


@pytest.mark.parametrize(("name", "overrides", "words"), UNKNOWN)
def test_an_unknown_name_is_answered_with_the_nearest(name, overrides, words):
    with pytest.raises(MethodError) as caught:
        load_method(name, **overrides)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value)[-1] in ".?"


WRONG_TYPES = [
    ({"advantage": "group"}, "expected a mapping of options, got 'group'"),
    ({"advantage": ["group"]}, "expected a mapping"),
    ({"advantage.eps": "1e-6"}, "advantage.eps: Input should be a valid number; got '1e-6'"),
    ({"advantage.clip": True}, "advantage.clip"),
    ({"advantage.ddof": 2}, "advantage.ddof: Input should be 0 or 1"),
    ({"advantage.unbiased": "yes"}, "advantage.unbiased"),
    ({"advantage.clip": -1.0}, "greater than 0"),
    ({"regulariser.kl": 0.04}, "regulariser.kl: expected a mapping"),
    ({"regulariser.kl.coefficient": -0.1}, "greater than or equal to 0"),
    ({"trust_region.high": "0.3"}, "trust_region ppo_clip.high: Input should be a valid number"),
    ({"trust_region.dual": [3]}, "trust_region ppo_clip.dual"),
    ({"ratio": 5}, "ratio: expected a component's name"),
    ({"ratio": {"name": "sequence", "product": 1}}, "valid boolean"),
    ({"objective": ["reinforce"]}, "objective: expected a component's name"),
    ({"filter": [{"kind": "truncated"}]}, "filter: expected a component's name"),
    ({"filter": 3}, "filter: expected a component's name"),
    ({"sampler.max_rounds": 2.5}, "sampler.max_rounds: Input should be a valid integer"),
    ({"sampler.valid_fraction": 1.5}, "less than or equal to 1"),
    ({"rollout.selection": "all_but_last"}, "rollout.selection"),
]


@pytest.mark.parametrize(("overrides", "words"), WRONG_TYPES)
def test_a_wrong_type_is_named_with_what_was_expected(overrides, words):
    with pytest.raises(MethodError) as caught:
        load_method("dapo", **overrides)
    assert words in str(caught.value)
    assert "method dapo" in str(caught.value)


CONTRADICTIONS = [
    (
        "gpg",
        {"trust_region": {"low": 0.1}},
        "trust_region has no effect with objective 'reinforce'",
    ),
    ("dapo", {"objective": "reinforce"}, "set it to null"),
    ("dapo", {"trust_region": {"dual": 1.1}}, "dual and delta must exceed"),
    ("dapo", {"trust_region": {"delta": 1.0}}, "dual and delta must exceed"),
    ("dapo", {"trust_region": {"low": -0.2}}, "must not be negative"),
    ("cispo", {"objective": {"min_weight": 9.0}}, "min_weight <= max_weight"),
    ("cpgd", {"objective": {"low": 1.0}}, "low < 1"),
    ("reinforce-pp", {"credit": "uniform"}, "needs credit 'reward_to_go'"),
    ("rloo", {"reward": {"combine": "gdpo"}}, "normalises each by itself"),
    ("flow-grpo", {"regulariser.kl.gradient": "k2"}, "has no effect with the divergence 'code'"),
    ("flow-grpo", {"rollout.kernel": "ode"}, "draws no noise"),
    ("dance-grpo", {"rollout.selection.fraction": 0.0}, "fraction"),
    ("dance-grpo", {"rollout.selection.fractoin": 0.5}, "fractoin"),
    ("gpg", {"advantage": {"whiten": "decisions"}}, "valid_group_factor"),
    ("rloo", {"reward.kl": -0.1}, "greater than or equal to 0"),
]


@pytest.mark.parametrize(("name", "overrides", "words"), CONTRADICTIONS)
def test_choices_that_make_no_sense_together_are_refused(name, overrides, words):
    with pytest.raises(MethodError) as caught:
        load_method(name, **overrides)
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_method_error_is_a_usage_error_with_exit_code_2():
    with pytest.raises(UsageError) as caught:
        load_method("grpoo")
    assert caught.value.exit_code == 2


def test_a_preset_with_an_unknown_slot_or_requirement_is_refused():
    with pytest.raises(MethodError, match=r"unknown slot 'agregate'.*'aggregate'"):
        Method.compose({"id": "x", "agregate": "token_mean"})
    with pytest.raises(MethodError, match=r"unknown requirement 'on_polcy'.*'on_policy'"):
        Method.compose({"id": "x", "requires": ["on_polcy"]})


# -- overrides ------------------------------------------------------------------------------------


def test_an_override_changes_only_what_it_names():
    method = load_method("dapo", **{"trust_region.high": 0.5})
    assert method.components["trust_region"] == {"name": "ppo_clip", "low": 0.2, "high": 0.5}
    method = load_method("flow-grpo", regulariser={"kl": {"coefficient": 0.01}})
    assert method.regulariser.kl.coefficient == 0.01
    assert method.regulariser.kl.estimator == "code"


def test_dotted_and_nested_overrides_are_the_same():
    dotted = load_method("grpo", **{"regulariser.kl.coefficient": 0.5, "advantage.scale": "none"})
    nested = load_method(
        "grpo", regulariser={"kl": {"coefficient": 0.5}}, advantage={"scale": "none"}
    )
    assert dotted.components == nested.components


def test_naming_another_component_drops_the_options_of_the_old_one():
    method = load_method("cispo", objective="policy_gradient")
    assert method.components["objective"] == "policy_gradient"
    assert load_method("gspo", ratio={"name": "token"}).components["ratio"] == {"name": "token"}
    same = load_method("gspo", ratio={"name": "sequence", "straight_through": True})
    assert same.components["ratio"]["product"] is False


def test_an_option_of_a_bare_name_makes_it_a_mapping():
    method = load_method("dr-grpo", **{"aggregate.length": 8})
    assert method.components["aggregate"] == {"name": "constant_norm", "length": 8}


def test_null_is_a_slots_default():
    method = load_method("gpg", objective=None)
    assert method.component("objective") == "policy_gradient"
    assert load_method("grpo", regulariser=None).needs == {"groups"}


def test_an_override_does_not_change_the_preset():
    load_method("grpo", advantage={"scale": "none"})
    assert load_method("grpo").advantage.scale == "group"


# -- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_short_and_says_what_it_is(name):
    preset = read_preset(name)
    method = load_method(name)
    assert method.id == name
    assert {"title", "paper", "family", "modalities", "confidence"} <= set(preset)
    assert set(method.modalities) <= set(MODALITIES)
    assert method.title
    assert method.paper
    slots = [key for key in preset if key in method.components]
    assert slots
    assert method.components == {key: preset[key] for key in slots}


@pytest.mark.parametrize("slot", COMPONENTS)
def test_every_registered_component_exists_and_is_documented(slot):
    for name in names(slot):
        assert resolve(slot, name).__doc__
