"""However an update is cut into micro-batches, minibatches' order or ranks: one gradient."""

import pytest
import torch
from fixtures_runs import REWARDS, document

from mmgrpo import build
from mmgrpo.config import list_presets, load_config
from mmgrpo.methods import load_method
from mmgrpo.trainer import step as step_module
from mmgrpo.trainer.metrics import Report
from mmgrpo.trainer.parts import State

CUTS = (1, 3, 5, 7)
CASES = [
    pytest.param(
        modality, preset,
        marks=[] if modality != "vision" or preset in ("grpo", "dapo") else [pytest.mark.slow],
    )
    for modality in ("text", "vision", "image")
    for preset in list_presets()
    if modality in load_method(preset).modalities
]  # fmt: skip


@pytest.fixture(scope="module")
def policies(models):
    """One policy per modality, loaded when first asked for, and its first weights."""
    loaded = {}

    def get(modality):
        if modality not in loaded:
            config = load_config(document(models, modality, "unused", method="grpo"))
            policy = build.make_policy(config, build.make_method(config))
            first = {n: p.detach().clone() for n, p in policy.network.named_parameters()}
            loaded[modality] = policy, first
        policy, first = loaded[modality]
        with torch.no_grad():
            for name, parameter in policy.network.named_parameters():
                parameter.copy_(first[name])
        return policy

    return get


def prepared(policies, models, modality, preset, tmp_path, **changes):
    """Parts, configuration and a credited rollout; then the weights move, so that ratios do."""
    doc = document(models, modality, tmp_path / "run", method=preset, **changes)
    config = load_config(doc)
    parts = build.assemble(config, policy=policies(modality))
    report = Report()
    collected = step_module.collect(parts, State(), config, report)
    trajectories = step_module.credit(parts, collected.trajectories, config, report)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parts.policy.network.parameters():
            parameter.add_(parameter.std().nan_to_num() * 0.03 * torch.randn_like(parameter))
    return parts, config, trajectories


def gradient(parts, config, trajectories, micro_batch_size):
    """The accumulated gradient of one update and its metrics; the weights stay."""
    settings = config.trainer.model_copy(update={"micro_batch_size": micro_batch_size})
    report, seen = Report(), {}
    parameters = parts.optimizer.parameters

    class Catch:
        def __init__(self):
            self.parameters = parameters

        def step(self, learning_rate):
            for name, parameter in parameters.items():
                seen[name] = parameter.grad.clone()
                parameter.grad = None

    optimizer, parts.optimizer = parts.optimizer, Catch()
    try:
        step_module.optimise(
            parts, trajectories, 0.1, config.model_copy(update={"trainer": settings}), report
        )
    finally:
        parts.optimizer = optimizer
    metrics = report.finish(parts.collective)
    return torch.cat([g.flatten() for g in seen.values()]), metrics


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("modality", "preset"), CASES)
def test_micro_batches_do_not_change_the_gradient(policies, models, tmp_path, modality, preset):
    parts, config, trajectories = prepared(
        policies, models, modality, preset, tmp_path, trainer={"max_grad_norm": None}
    )
    whole, metrics = gradient(parts, config, trajectories, None)
    assert whole.norm() > 0
    assert abs(metrics["ratio/mean"] - 1) > 1e-7  # the comparison is off-policy
    for size in CUTS:
        pieces, of_pieces = gradient(parts, config, trajectories, size)
        assert distance(pieces, whole) < 1e-5
        for name in ("loss", "kl", "clip_fraction", "ratio/mean"):
            assert of_pieces[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6)


def test_ragged_groups_too(policies, models, tmp_path):
    parts, config, trajectories = prepared(
        policies, models, "text", "grpo", tmp_path,
        rewards=[f"{REWARDS}:broken_for_some"], reward_failure="drop",
    )  # fmt: skip
    sizes = torch.unique(trajectories.group, return_counts=True)[1]
    assert len(set(sizes.tolist())) > 1
    whole, _ = gradient(parts, config, trajectories, None)
    for size in CUTS:
        assert distance(gradient(parts, config, trajectories, size)[0], whole) < 1e-5


def test_the_comparison_sees_a_local_denominator(policies, models, tmp_path, monkeypatch):
    parts, config, trajectories = prepared(policies, models, "text", "dapo", tmp_path)
    whole, _ = gradient(parts, config, trajectories, None)
    loss = parts.method.loss
    method = parts.method

    class Local:
        request, needs = method.request, method.needs

        def loss(self, log_prob, micro, *, evaluation, total):
            return loss(log_prob, micro, evaluation=evaluation)

    monkeypatch.setattr(parts, "method", Local())
    assert distance(gradient(parts, config, trajectories, 3)[0], whole) > 0.1


def test_rows_that_are_not_trained_cost_no_call(policies, models, tmp_path):
    parts, config, trajectories = prepared(policies, models, "text", "dapo", tmp_path)
    off = trajectories.mask.clone()
    off[4:] = False
    fewer = trajectories.replace(mask=off)
    parts.policy.forwards = 0
    rows = torch.arange(len(fewer))
    batch = step_module.trained(fewer, rows)
    assert len(batch) == int(off.any(dim=1).sum()) < 5
    assert distance(
        gradient(parts, config, batch, 1)[0], gradient(parts, config, fewer, None)[0]
    ) < 1e-5  # fmt: skip


@pytest.mark.parametrize("modality", ["text", "image"])
def test_nothing_to_train_leaves_weights_and_moments_alone(policies, models, tmp_path, modality):
    parts, config, trajectories = prepared(policies, models, modality, "dapo", tmp_path)
    before = {n: p.detach().clone() for n, p in parts.optimizer.parameters.items()}
    nothing = trajectories.replace(mask=torch.zeros_like(trajectories.mask))
    state = State()
    step_module.update(parts, nothing, state, config, Report())
    assert state.updates == 1
    for name, parameter in parts.optimizer.parameters.items():
        assert torch.equal(parameter, before[name])
        assert f"exp_avg/{name}" not in parts.optimizer.state_dict()
