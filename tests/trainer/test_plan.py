"""The plan's numbers are what a run then does: backward passes, and activation checkpointing."""

import logging

import pytest
import torch
from fixtures_runs import document
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo import build, plan
from mmgrpo.config import load_config
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.trainer.batches import micro_batch_bounds, micro_batches
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import train_step


def line(text, name):
    return next(row for row in text.splitlines() if row.startswith(name))


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    group=st.integers(1, 3),
    size=st.none() | st.integers(1, 8),
    decisions=st.none() | st.integers(1, 30),
    whole=st.booleans(),
)
def test_the_bounds_are_those_of_rows_of_full_length(lengths, group, size, decisions, whole):
    count = len(lengths) * group
    ids = torch.arange(count) // group
    together = {"decisions": decisions, "whole_groups": whole}
    most, pieces = micro_batch_bounds(
        count, 6, size, decisions=decisions, group=group if whole else 1
    )

    def cut(widths):
        mask = torch.arange(6) < torch.tensor(widths)[:, None]
        return micro_batches(Trajectories(group=ids, mask=mask), size, **together)

    full = cut([6] * count)
    assert max(map(len, full)) == most
    assert len(full) == pieces
    assert len(cut([length for length in lengths for _ in range(group)])) <= pieces


BUDGETS = {
    "none": ({}, {}, "2 backward pass(es) of at most 8 samples"),
    "rows": ({"micro_batch_size": 3}, {}, "6 backward pass(es) of at most 3 samples"),
    "decisions": (
        {}, {"micro_batch_decisions": 15},
        "8 backward pass(es) of at most 8 samples and 15 decisions",
    ),
    "both": (
        {"micro_batch_size": 3}, {"micro_batch_decisions": 13},
        "8 backward pass(es) of at most 3 samples and 13 decisions",
    ),
    "fewer than a sample has": (
        {}, {"micro_batch_decisions": 2},
        "16 backward pass(es) of at most 8 samples and 6 decisions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BUDGETS)
def test_the_planned_backward_passes_are_those_of_a_step(models, tmp_path, case):
    """Nothing ends early here, so that the bound is reached."""
    trainer, speed, expected = BUDGETS[case]
    doc = document(
        models, "text", tmp_path, rollout={"stop": []}, speed={"skip_idle": False, **speed},
        trainer={"minibatches": 2, **trainer},
    )  # fmt: skip
    config = load_config(doc)
    update = line(build.plan(config), "update")
    assert update == f"update      2 optimiser step(s), {expected}"
    parts, state = build.assemble(config), State()
    parts.policy.model.generation_config.eos_token_id = []
    train_step(parts, state, config)
    assert state.metrics["count/backward"] == int(expected.split()[0])


def test_a_budget_without_a_known_length_is_named(models, tmp_path):
    doc = document(models, "image_tokens", tmp_path, speed={"micro_batch_decisions": 50})
    doc["model"]["path"] = "someone/unknown"
    text = line(build.plan(load_config(doc)), "update")
    assert text.endswith("backward passes of at most 16 samples and 50 decisions")


# -- activation checkpointing ---------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device: 4 * 2**20)


def small_pieces(models, folder, modality="text", **changes):
    return load_config(document(models, modality, folder, **changes))


@pytest.mark.parametrize("modality", ["text", "vision", "image_tokens"])
def test_enough_memory_leaves_checkpointing_off(models, tmp_path, modality):
    config = small_pieces(models, tmp_path, modality)
    planned = line(build.plan(config), "activations")
    assert planned.startswith("activations checkpointing off: 16 ")
    assert planned.endswith("prompts are taken to be as long as completions")
    assert not build.assemble(config).policy._checkpointing


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_little_memory_switches_it_on_in_the_plan_and_in_the_run(
    models, tmp_path, modality, little_memory, caplog
):
    config = small_pieces(models, tmp_path, modality, rollout={"max_new_tokens": 100})
    assert line(build.plan(config), "activations").startswith("activations checkpointing on: 16 ")
    with caplog.at_level(logging.INFO, logger="mmgrpo"):
        parts = build.assemble(config)
    assert parts.policy._checkpointing
    assert parts.policy.model.is_gradient_checkpointing
    [record] = [r for r in caplog.records if "activation checkpointing" in r.message]
    assert record.levelno == logging.WARNING
    longest = f"prompts of {parts.policy.longest_prompt} tokens would need about"
    assert longest in record.message


def test_a_smaller_micro_batch_does_without(models, tmp_path, little_memory):
    small = {"rollout": {"max_new_tokens": 100}, "trainer": {"micro_batch_size": 1}}
    config = small_pieces(models, tmp_path, **small)
    assert "checkpointing off: 1 samples" in build.plan(config)
    budget = {"rollout": {"max_new_tokens": 100}, "speed": {"micro_batch_decisions": 100}}
    assert "checkpointing off: 1 samples" in build.plan(small_pieces(models, tmp_path, **budget))


@pytest.mark.parametrize("given", [True, False])
def test_what_the_configuration_says_holds(models, tmp_path, little_memory, given):
    config = small_pieces(models, tmp_path, model={"gradient_checkpointing": given})
    shown = "on" if given else "off"
    expected = f"checkpointing {shown}: as model.gradient_checkpointing says"
    assert expected in build.plan(config)
    assert build.assemble(config).policy._checkpointing is given


def test_what_is_not_estimated_is_left_off(models, tmp_path, little_memory):
    image = small_pieces(models, tmp_path, "image")
    assert "off: the activations of this kind of model are not estimated" in build.plan(image)
    tower = small_pieces(models, tmp_path, "vision", model={"train_vision": True})
    assert "off: the activations of this kind of model are not estimated" in build.plan(tower)
    eager = small_pieces(models, tmp_path, model={"attention": "eager"})
    assert "off: the activations of this kind of model are not estimated" in build.plan(eager)
    unknown = small_pieces(models, tmp_path, model={"path": "someone/unknown"})
    assert "off: the sizes of the model or of the memory are not known" in build.plan(unknown)


def test_a_policy_of_the_user_keeps_its_setting(models, tmp_path, little_memory):
    config = small_pieces(models, tmp_path, rollout={"max_new_tokens": 100})
    policy = build.make_policy(config, build.make_method(config))
    assert not build.assemble(config, policy=policy).policy._checkpointing
