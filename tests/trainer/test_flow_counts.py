"""What a training step of an image method reports: network calls, backward passes, decisions."""

from __future__ import annotations

import pytest
import torch
from fixtures_flow import SIZE, sd3_pipeline

pytest.importorskip("diffusers")

from mmgrpo import Trainer
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import train_step

STEPS, GROUP = 6, 16


@pytest.fixture(scope="module")
def policy():
    return FlowPolicy(sd3_pipeline(), max_prompt_tokens=3, reference="none")


def spread(prompts, **_columns):
    return [float(place % 5) for place in range(len(prompts))]


def first_step(policy, folder, method, **options):
    trainer = Trainer(
        policy, reward=spread, data=[{"prompt": "draw 42"}], method=method, num_steps=STEPS,
        height=SIZE, width=SIZE, prompts_per_step=1, steps=2, run_dir=str(folder / "run"),
        **{"group_size": GROUP, **options},
    )  # fmt: skip
    trainer.parts.engine.decode = False
    state = State()
    train_step(trainer.parts, state, trainer.config)
    return state.metrics


WITHOUT_KL = {"id": "flow-grpo", "regulariser": None}


@pytest.mark.parametrize(
    ("method", "options", "forwards", "backwards", "decisions"),
    [
        (WITHOUT_KL, {}, STEPS + 1, 1, 5 * GROUP),
        (WITHOUT_KL, {"micro_batch_size": 4}, STEPS + 4, 4, 5 * GROUP),
        ("dance-grpo", {}, STEPS + 1, 1, 3 * GROUP),
        ("mix-grpo", {}, STEPS + 1, 1, 4 * GROUP),
        ("mix-grpo-flash", {}, 4 + 1 + 1, 1, 4 * GROUP),
        # splits at 0, 1 and 2 of 6 steps: two trees of 8 leaves
        ("branch-grpo", {}, STEPS + 1, 1, 2 * (2 + 4 + 8 * 3)),
        ("branch-grpo-pruned", {}, STEPS + 1, 1, 2 * (2 + 4 + 8 * 3)),
        ("branch-grpo-mix", {}, STEPS + 1, 1, 2 * (2 + 4 + 8)),
        # the old velocities are those of the rollout
        ("dynamic-treerpo", {}, STEPS + 1, 1, 2 + 4 + 8 + 16),
        ("pref-grpo", {}, STEPS + 1, 1, 3 * GROUP),
        ("grpo-guard", {}, STEPS + 1, 1, 5 * GROUP),
        ("flow-dppo", {}, STEPS + 1, 1, 5 * GROUP),
    ],
)
def test_a_step_costs_what_its_formula_says(
    policy, tmp_path, method, options, forwards, backwards, decisions
):
    metrics = first_step(policy, tmp_path, method, **options)
    assert metrics["count/forward"] == forwards
    assert metrics["count/backward"] == backwards
    assert metrics["count/generated_decisions"] == decisions


def test_two_granularities_cost_two_suffixes(policy, tmp_path):
    """Noise at step k of 6: k + 1 trunk calls, 5 - k on the grid, half of that on the coarse."""
    metrics = first_step(policy, tmp_path, "g2rpo", group_size=4)
    costs = {k + 1 + (5 - k) + len(range(k + 2, 7, 2)) + 1 for k in (0, 1, 2)}
    assert metrics["count/forward"] in costs
    assert metrics["count/backward"] == 1
    assert metrics["count/generated_decisions"] == 4
    assert metrics["count/reward_calls"] == 8


def counted_step(folder, monkeypatch, method, **options):
    """The metrics of a first step, and the states that its update evaluates."""
    policy, states = FlowPolicy(sd3_pipeline(), max_prompt_tokens=3, reference="none"), []
    plain = policy.velocity

    def counted(latents, *rest):
        if torch.is_grad_enabled():
            states.append(len(latents))
        return plain(latents, *rest)

    monkeypatch.setattr(policy, "velocity", counted)
    return first_step(policy, folder, method, **options), states


@pytest.mark.parametrize("method", ["branch-grpo", "branch-grpo-pruned", "branch-grpo-mix"])
def test_a_cut_batch_evaluates_no_shared_decision_twice(tmp_path, monkeypatch, method):
    whole, once = counted_step(tmp_path, monkeypatch, method)
    for size in (1, 5):
        cut, states = counted_step(tmp_path, monkeypatch, method, micro_batch_size=size)
        assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-7)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        assert len(once) == 1 < len(states)
        trained = {"branch-grpo": 60, "branch-grpo-pruned": 60 - 2 * 4 * 2, "branch-grpo-mix": 28}
        # siblings in different pieces each ask for the state they share
        assert once[0] <= sum(states) <= trained[method]
    rows = {"branch-grpo": 16 * 5, "branch-grpo-pruned": 16 * 5 - 16, "branch-grpo-mix": 16 * 3}
    assert sum(states) < rows[method]
