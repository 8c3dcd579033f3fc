"""A separate engine's own log-probabilities: reported, shown, and weighed by the correction."""

import dataclasses
import json

import pytest
import torch
from fixtures_runs import document

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.trainer.loop import fit
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import train_step

NOISE = 0.3


def with_engine(parts, seed=0):
    """The engine's numbers differ from the policy's by noise."""
    generate, generator = parts.engine.generate, torch.Generator().manual_seed(seed)

    def noisy(*arguments, **options):
        rollout = generate(*arguments, **options)
        rows = rollout.trajectories
        noise = NOISE * torch.randn(rows.mask.shape, generator=generator) * rows.mask
        token = {"place": 0, "token": "x", "rollout_log_prob": -1.0, "old_log_prob": -2.0}
        return dataclasses.replace(
            rollout,
            trajectories=rows.replace(rollout_log_prob=rows.old_log_prob - noise),
            samples=[dataclasses.replace(one, mismatch=(token,)) for one in rollout.samples],
        )

    parts.engine.generate = noisy
    return parts


def assemble(models, run_dir, **changes):
    config = load_config(document(models, "text", run_dir, **changes))
    return build.assemble(config), config


def test_the_step_reports_how_far_the_engine_was(models, tmp_path):
    parts, config = assemble(models, tmp_path / "run", rollout={"group_size": 16})
    state = State()
    train_step(parts, state, config)
    assert not [name for name in state.metrics if name.startswith("mismatch/")]
    train_step(with_engine(parts), state, config)
    found = state.metrics
    assert found["mismatch/kl"] == pytest.approx(NOISE**2 / 2, rel=0.3)
    assert found["mismatch/ratio_p50"] == pytest.approx(1, abs=0.1)
    assert 1.5 < found["mismatch/ratio_p99"] < found["mismatch/ratio_max"]
    assert found["ratio/first_max_deviation"] < 1e-4  # of the policy itself


def test_the_worst_tokens_are_among_the_samples(models, tmp_path):
    run = tmp_path / "run"
    parts, config = assemble(models, run, trainer={"steps": 1})
    from functools import partial

    from mmgrpo.tracking import write_samples

    parts.write_samples = partial(write_samples, run)
    fit(with_engine(parts), config)
    lines = (run / "samples" / "step_000001.jsonl").read_text().splitlines()
    assert all(json.loads(line)["mismatch"][0]["token"] == "x" for line in lines)


def test_the_correction_weighs_each_token(models, tmp_path):
    """The gradient is that of advantages multiplied by min(exp(l), cap)."""
    cap = 1.2
    method = {"id": "dr-grpo", "correction": {"name": "truncated", "cap": cap}}
    parts, _ = assemble(models, tmp_path / "run", method=method)
    rollout = with_engine(parts).engine.generate(
        parts.prompts.batch(0, 2), group_size=4, seed=1, version=0, iteration=0
    )
    rows = rollout.trajectories.replace(reward=torch.arange(8.0))
    prepared = parts.method.prepare(rows, collective=parts.collective)
    loss = parts.method.loss(rows.old_log_prob, prepared, evaluation=None, total=None).loss
    weight = (rows.old_log_prob - rows.rollout_log_prob).exp().clamp(max=cap)
    plain = prepared.replace(advantage=prepared.advantage * weight, rollout_log_prob=None)
    expected = parts.method.loss(rows.old_log_prob, plain, evaluation=None, total=None).loss
    torch.testing.assert_close(loss, expected)
    assert (weight == cap).any()
    assert (weight < 1).any()
