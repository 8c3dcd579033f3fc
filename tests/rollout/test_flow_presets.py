"""Every image preset on a real network: on policy the ratio is 1; what it costs, by formula."""

from __future__ import annotations

import pytest
import torch
from flow_drawing import PROMPTS, STEPS, count_states, draw, draw_method
from torch.distributions import Normal

from mmgrpo.core.diffusion import transition
from mmgrpo.methods import list_presets, load_method
from mmgrpo.protocols import Request

GROUP = 16
ONE = PROMPTS[:1]


def has_ratio(name):
    """Whether the decisions are noisy steps whose ratio enters the loss."""
    method = load_method(name)
    image = "image" in method.modalities and method.rollout.kernel != "ode"
    return image and method.component("objective") == "policy_gradient"


PRESETS = [name for name in list_presets() if has_ratio(name)]


def prepared_rollout(policy, name, **options):
    """A rollout with rewards, and predictions of the weights that drew it."""
    found = draw_method(policy, name, prompts=ONE, **options).trajectories
    with torch.no_grad():
        old = policy.evaluate(found, Request(prediction=True)).prediction
    rewards = {"score": torch.rand(len(found), generator=torch.Generator().manual_seed(7))}
    filled = found.replace(
        rewards=rewards, old_prediction=old, ref_prediction=old, ref_log_prob=found.old_log_prob,
        baseline_reward=torch.zeros(len(found)),
    )  # fmt: skip
    return load_method(name).prepare(filled)


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_every_ratio_is_one(policy, name):
    method, prepared = load_method(name), prepared_rollout(policy, name, group_size=GROUP)
    found = policy.evaluate(prepared, method.request)
    output = method.loss(found.log_prob, prepared, evaluation=found)
    assert output.max_log_ratio < 2e-6
    assert output.metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert output.metrics["clip_fraction"] == 0
    output.loss.backward()
    assert policy.network.proj_out.weight.grad.norm() > 0
    policy.network.zero_grad()


# -- what a window costs --------------------------------------------------------------------------


def cost(policy, monkeypatch, name, *, overrides=None, iteration=0, steps=STEPS, group=GROUP):
    """States in each call of the rollout, states of one evaluation, and distinct decisions."""
    seen = count_states(policy, monkeypatch)
    rollout = draw_method(
        policy, name, overrides=overrides, iteration=iteration, num_steps=steps, group_size=group,
        prompts=ONE,
    )  # fmt: skip
    drawn = list(seen)
    seen.clear()
    policy.evaluate(rollout.trajectories)
    return drawn, sum(seen), rollout.cost.decisions


def test_training_on_every_step(policy, monkeypatch):
    drawn, trained, decisions = cost(policy, monkeypatch, "flow-grpo")
    assert drawn == [GROUP] * STEPS
    assert trained == decisions == GROUP * (STEPS - 1)


def test_a_random_part_of_the_steps(policy, monkeypatch):
    """16 steps, 60 %: floor(0.6 x 15) = 9 of each sample; the first state is one for the group."""
    drawn, trained, decisions = cost(policy, monkeypatch, "dance-grpo", steps=16)
    assert drawn == [1] + [GROUP] * 15
    assert decisions == 9 * GROUP
    first = draw_method(
        policy, "dance-grpo", num_steps=16, group_size=GROUP, prompts=ONE
    ).trajectories.mask[:, 0]
    assert 1 < first.sum() < GROUP
    assert trained == 9 * GROUP - int(first.sum()) + 1


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_sliding_window(policy, monkeypatch, start):
    moved = {"selection": {"interval": 1}}
    drawn, trained, decisions = cost(
        policy, monkeypatch, "mix-grpo", overrides=moved, iteration=start, steps=12
    )
    assert drawn == [1] * (start + 1) + [GROUP] * (11 - start)
    assert (trained, decisions) == (1 + 3 * GROUP, 4 * GROUP)


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_sliding_window_with_a_fast_end(policy, monkeypatch, start):
    moved = {"selection": {"interval": 1}}
    drawn, trained, _ = cost(
        policy, monkeypatch, "mix-grpo-flash", overrides=moved, iteration=start, steps=12
    )
    points = int((12 - (start + 3)) * 0.4)  # both ends counted, after the last step of the window
    assert drawn == [1] * (start + 1) + [GROUP] * (3 + max(points, 2) - 1)
    assert trained == 1 + 3 * GROUP


def test_a_random_window(policy, monkeypatch):
    drawn, trained, decisions = cost(policy, monkeypatch, "flow-grpo-fast")
    assert sum(drawn) == GROUP * STEPS
    assert trained == decisions == 2 * GROUP


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_tree_in_a_window(policy, monkeypatch, start):
    moved = {"selection": {"interval": 1}}
    drawn, trained, decisions = cost(
        policy, monkeypatch, "dynamic-treerpo", overrides=moved, iteration=start, steps=12
    )
    assert drawn == [1] * (start + 1) + [2, 4, 8] + [16] * (8 - start)
    assert (trained, decisions) == (1 + 2 + 4 + 8, 2 + 4 + 8 + 16)


# -- noise that grows, and the supervised term ----------------------------------------------------


def test_every_edge_keeps_its_own_noise_level(policy):
    """Log-probabilities against a normal whose std has the level of the edge's depth."""
    found = draw_method(policy, "dynamic-treerpo", group_size=GROUP, prompts=ONE).trajectories
    with torch.no_grad():
        velocity = policy.evaluate(found, Request(prediction=True)).prediction
    payload, sigmas = found.payload, found.payload.sigmas
    for step, eta in enumerate((0.7, 0.7875, 0.875, 0.9625)):
        mean, std = transition(
            "flow_sde", velocity[:, step], payload.latents[:, step], sigmas[step],
            sigmas[step + 1], eta=eta, sigma_max=sigmas[1],
        )  # fmt: skip
        assert found.step_std[0, step].item() == pytest.approx(std.item(), rel=1e-6)
        density = Normal(mean, std).log_prob(payload.latents[:, step + 1])
        torch.testing.assert_close(
            density.flatten(1).mean(dim=1), found.old_log_prob[:, step], rtol=0, atol=3e-6
        )
    plain = draw_method(
        policy, "dynamic-treerpo", overrides={"noise_growth": 0.0}, group_size=GROUP, prompts=ONE
    ).trajectories
    assert torch.equal(plain.payload.latents[:, 1], found.payload.latents[:, 1])
    assert not torch.equal(plain.payload.latents[:, 2], found.payload.latents[:, 2])


def test_without_growth_and_supervision_it_is_a_tree_with_a_contiguous_split_window(policy):
    bare = {"noise_growth": 0.0, "tree": {"splits": [0, 1, 2, 3]}}
    wanted = draw_method(
        policy, "branch-grpo-mix", group_size=GROUP, prompts=ONE, overrides={
            "kernel": "flow_sde", "eta": 0.7, "shared_noise": True,
            "selection": {"at": [0, 1, 2, 3]},
        },
    ).trajectories  # fmt: skip
    found = draw_method(
        policy, "dynamic-treerpo", overrides=bare, group_size=GROUP, prompts=ONE
    ).trajectories
    assert torch.equal(found.payload.latents, wanted.payload.latents)
    assert torch.equal(found.node, wanted.node)


def test_the_supervised_term_pulls_towards_the_best_path(policy):
    method = load_method("dynamic-treerpo", regulariser={"kl": {"coefficient": 1.0}})
    prepared = prepared_rollout(policy, "dynamic-treerpo", group_size=GROUP)
    found = policy.evaluate(prepared, method.request)
    best = int(prepared.rewards["score"].argmax())
    gap = prepared.old_prediction - prepared.old_prediction[best]
    wanted = (gap**2).flatten(2).mean(dim=2) * prepared.mask
    torch.testing.assert_close(found.divergence, wanted, rtol=1e-4, atol=1e-7)
    assert (found.divergence[best] < 1e-10).all()
    assert (wanted[:, 0] == 0).all()  # one root
    output = method.loss(found.log_prob, prepared, evaluation=found)
    edges = {}
    for row, step in prepared.mask.nonzero().tolist():
        edges[int(prepared.node[row, step])] = wanted[row, step].item()
    assert len(edges) == 30
    assert output.metrics["kl"] == pytest.approx(sum(edges.values()) / 30, rel=1e-4)


@pytest.mark.parametrize("name", ["dynamic-treerpo", "g2rpo", "mix-grpo-flash", "grpo-guard"])
def test_the_kept_velocities_are_those_of_an_evaluation(policy, name):
    found = draw_method(policy, name, group_size=GROUP, keep_velocity=True).trajectories
    with torch.no_grad():
        wanted = policy.evaluate(found, Request(prediction=True)).prediction
    mask = found.mask
    torch.testing.assert_close(found.old_prediction[mask], wanted[mask], rtol=0, atol=2e-6)
    assert draw_method(policy, name, group_size=GROUP).trajectories.old_prediction is None


# -- guard ----------------------------------------------------------------------------------------


def test_pref_grpo_without_win_rates_and_guard_is_dance_grpo_with_other_noise(policy):
    wanted = draw(
        policy, prompts=ONE, selection={"kind": "random_fraction", "fraction": 0.6},
        shared_noise=True,
    ).trajectories  # fmt: skip
    found = draw_method(policy, "pref-grpo", prompts=ONE).trajectories
    assert torch.equal(found.payload.latents, wanted.payload.latents)
    assert torch.equal(found.mask, wanted.mask)
    plain = load_method("pref-grpo", ratio=None, reward={"shaping": None})
    rewards = {"score": torch.tensor([1.0, 0.0, 0.5, 0.7])}
    one, other = (m.prepare(found.replace(rewards=rewards))
                  for m in (plain, load_method("dance-grpo")))  # fmt: skip
    assert torch.equal(one.advantage, other.advantage)
    moved = found.old_log_prob + 3e-4 * torch.randn(found.mask.shape)
    losses = [m.loss(moved, one) for m in (plain, load_method("dance-grpo"))]
    assert losses[0].loss == losses[1].loss
