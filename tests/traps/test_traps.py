"""Silent bugs of the field, put in on purpose: each must be seen before it costs a run.

What a run sees by itself is the ratio before the first update, which must be 1; the clean run is
the control.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from fixtures_runs import document, metrics_of

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods import load_method
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.flow_families.base import GuidedFamily
from mmgrpo.protocols import Evaluation, Request
from mmgrpo.rollout.flow import FlowEngine

GUIDED = {"guidance_scale": 4.0}
DEVIATION = "ratio/first_max_deviation"


def run(models, run_dir, method="flow-grpo", **changes):
    """A step of training on the tiny image model: (warnings, metrics)."""
    config = load_config(
        document(models, "image", run_dir, method=method, **{"trainer": {"steps": 1}, **changes})
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build.train(config)
    said = [str(w.message) for w in caught if "before the first update" in str(w.message)]
    return said, metrics_of(run_dir)[-1]


def in_training(monkeypatch, change):
    """Apply ``change`` to the policy during ``evaluate`` only, as a slip in the update would."""
    real = FlowPolicy.evaluate

    def evaluate(policy, trajectories, *rest):
        with monkeypatch.context() as patch:
            change(policy, patch)
            return real(policy, trajectories, *rest)

    monkeypatch.setattr(FlowPolicy, "evaluate", evaluate)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_a_trap_nothing_is_said(models, tmp_path, guidance):
    said, metrics = run(models, tmp_path / "run", rollout={"guidance_scale": guidance})
    assert said == []
    assert metrics[DEVIATION] < 2e-6


def test_latents_stored_in_bfloat16_after_a_float32_log_prob(models, tmp_path, monkeypatch):
    real = FlowPolicy.payload

    def rounding(policy, prompts, prompt_row, latents, *rest, **options):
        return real(policy, prompts, prompt_row, latents.bfloat16().float(), *rest, **options)

    monkeypatch.setattr(FlowPolicy, "payload", rounding)
    said, _ = run(models, tmp_path / "run")
    assert said
    assert "precision of logits or latents" in said[0]


def test_whole_numbers_as_timesteps(models, tmp_path, monkeypatch):
    """``int(1000 sigma)`` in the update: the network sees another noise level."""

    def whole(policy, patch):
        real = GuidedFamily.velocity

        def velocity(family, network, latents, sigma, *rest, **options):
            return real(family, network, latents, (1000 * sigma).int() / 1000, *rest, **options)

        patch.setattr(GuidedFamily, "velocity", velocity)

    in_training(monkeypatch, whole)
    said, _ = run(models, tmp_path / "run")
    assert said


def test_prompts_tiled_instead_of_repeated(models, tmp_path, monkeypatch):
    """Rows 0 1 2 3 get the prompts a b a b, not a a b b."""
    real = FlowPolicy.payload

    def tiled(policy, prompts, prompt_row, *rest, **options):
        places = torch.arange(len(prompt_row)) % len(prompts)
        return real(policy, prompts, places, *rest, **options)

    monkeypatch.setattr(FlowPolicy, "payload", tiled)
    said, _ = run(models, tmp_path / "run")
    assert said


def test_the_negative_prompt_missing_in_the_update(models, tmp_path, monkeypatch):
    def forget(policy, patch):
        real = GuidedFamily.velocity

        def velocity(family, *rest, **options):
            return real(family, *rest, **{**options, "negative": None})

        patch.setattr(GuidedFamily, "velocity", velocity)

    in_training(monkeypatch, forget)
    said, _ = run(models, tmp_path / "run", rollout=GUIDED)
    assert said
    assert "guidance" in said[0]


def test_another_guidance_in_the_update(models, tmp_path, monkeypatch):
    def weaker(policy, patch):
        real = GuidedFamily.velocity

        def velocity(family, *rest, **options):
            return real(family, *rest, **{**options, "guidance": 3.9})

        patch.setattr(GuidedFamily, "velocity", velocity)

    in_training(monkeypatch, weaker)
    said, _ = run(models, tmp_path / "run", rollout=GUIDED)
    assert said


def test_the_guidance_of_the_configuration_reaches_the_rollout(models, tmp_path):
    """One of the field's bugs never forwarded it: the same seed would draw the same images."""
    drawn = []
    for scale in (1.0, 4.0):
        doc = document(models, "image", tmp_path / f"{scale}", rollout={"guidance_scale": scale})
        parts = build.assemble(load_config(doc))
        prompts = list(parts.prompts.all(2))
        rollout = parts.engine.generate(prompts, group_size=2, seed=1)
        assert rollout.trajectories.payload.prompts.guidance_scale == scale
        drawn.append(rollout.trajectories.payload.latents)
    assert not torch.allclose(*drawn, atol=1e-3)


def test_one_step_more_in_the_rollout(models, tmp_path, monkeypatch):
    """An engine that makes another step than it was told is seen by its count of calls."""
    real = FlowEngine.generate

    def longer(engine, *rest, **options):
        rollout = real(engine, *rest, **options)
        return replace(rollout, cost=replace(rollout.cost, forwards=rollout.cost.forwards + 1))

    _, metrics = run(models, tmp_path / "clean", "dance-grpo")
    monkeypatch.setattr(FlowEngine, "generate", longer)
    _, trapped = run(models, tmp_path / "run", "dance-grpo")
    # 4 calls of the rollout and one of the update
    assert metrics["count/forward"] == 4 + 1
    assert trapped["count/forward"] != 4 + 1


@pytest.mark.parametrize("estimator", ["exact", "code", "velocity", "mean", "k3"])
def test_the_penalty_has_a_gradient(estimator):
    """A KL inside ``no_grad`` is logged and does nothing."""
    kl = {"estimator": estimator, "coefficient": 1.0, "target": "ref"}
    method = load_method("flow-grpo", regulariser={"kl": kl})
    log_prob = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    divergence = torch.tensor([[0.3, 0.2]], requires_grad=True)
    trajectories = Trajectories(
        group=torch.tensor([0]),
        mask=torch.ones(1, 2),
        old_log_prob=log_prob.detach(),
        ref_log_prob=torch.tensor([[-1.5, -1.0]]),
        advantage=torch.zeros(1, 2),
    )
    evaluation = Evaluation(log_prob, divergence=divergence)
    method.loss(log_prob, trajectories, evaluation=evaluation).loss.backward()
    leaf = log_prob if estimator == "k3" else divergence
    assert leaf.grad is not None
    assert bool((leaf.grad != 0).all())


@pytest.mark.parametrize("estimator", ["exact", "code", "velocity", "mean"])
def test_the_policy_s_divergence_reaches_the_weights(models, tmp_path, estimator):
    """With zero advantage only the penalty pulls, and only off the reference."""
    kl = {"estimator": estimator, "coefficient": 1.0}
    method = {"id": "flow-grpo", "regulariser": {"kl": kl}, "filter": None}
    doc = document(models, "image", tmp_path / "run", method=method)
    parts = build.assemble(load_config(doc))
    rollout = parts.engine.generate(list(parts.prompts.all(2)), group_size=2, seed=1)
    nothing = torch.zeros(rollout.trajectories.mask.shape)
    trajectories = rollout.trajectories.replace(advantage=nothing)
    with torch.no_grad(), parts.policy.reference():
        reference = parts.policy.evaluate(trajectories, Request(prediction=True)).prediction
    with torch.no_grad():
        for parameter in parts.policy.network.parameters():
            parameter.add_(0.01)
    trajectories = trajectories.replace(ref_prediction=reference)
    evaluation = parts.policy.evaluate(trajectories, parts.method.request)
    loss = parts.method.loss(evaluation.log_prob, trajectories, evaluation=evaluation).loss
    loss.backward()
    norms = [float(p.grad.norm()) for p in parts.policy.network.parameters() if p.grad is not None]
    assert max(norms) > 0
