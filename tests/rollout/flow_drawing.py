"""Draws from a tiny flow policy, and counts the states that the network sees."""

from __future__ import annotations

import torch
from fixtures_flow import SIZE

from mmgrpo.methods import load_method
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.flow import FlowEngine

CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 network calls of different batch sizes
PROMPTS = [Prompt(4, "draw 42"), Prompt(9, "red circle")]
STEPS = 6


def draw(policy, *, prompts=PROMPTS, group_size=4, seed=1, iteration=0, on_samples=None, **options):
    engine = FlowEngine(
        policy, **{"num_steps": STEPS, "height": SIZE, "width": SIZE, "decode": False, **options}
    )
    return engine.generate(
        prompts, group_size=group_size, seed=seed, iteration=iteration, on_samples=on_samples
    )


def draw_method(policy, name, *, overrides=None, **options):
    """Draw with the rollout that a preset fixes."""
    fixed = load_method(name, rollout=overrides or {}).rollout
    return draw(
        policy, kernel=fixed.kernel, eta=fixed.eta, selection=fixed.selection,
        shared_noise=fixed.shared_noise, tree=fixed.tree, suffix=fixed.suffix,
        noise_growth=fixed.noise_growth, **options,
    )  # fmt: skip


def assert_same(one, other):
    """Bit for bit the same states, decisions and log-probabilities."""
    assert torch.equal(one.payload.latents, other.payload.latents)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.old_log_prob, other.old_log_prob)


def count_states(policy, monkeypatch):
    """The number of states in every network call from now on."""
    seen: list[int] = []
    plain = type(policy).velocity

    def counted(latents, *rest):
        seen.append(len(latents))
        return plain(policy, latents, *rest)

    monkeypatch.setattr(policy, "velocity", counted)
    return seen


def moved_evaluation(policy, trajectories, method):
    """The method's view of decisions after the network has changed, and the change undone."""
    with torch.no_grad():
        old = policy.evaluate(trajectories, Request(prediction=True)).prediction
        trajectories = trajectories.replace(old_prediction=old)
        policy.network.proj_out.bias.add_(0.02)
        found = policy.evaluate(trajectories, method.request)
        now = policy.evaluate(trajectories, Request(prediction=True)).prediction
        policy.network.proj_out.bias.sub_(0.02)
    return trajectories, found, now
