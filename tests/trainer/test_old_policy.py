"""An average of the weights as the old policy: who samples, who is compared with, what is kept."""

import pytest
import torch
from fixtures_runs import document
from torch import nn

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.core.seeding import mix_seed
from mmgrpo.errors import MethodError
from mmgrpo.methods import load_method
from mmgrpo.methods.options import OldPolicy
from mmgrpo.policies.weights import Ema
from mmgrpo.protocols import Request
from mmgrpo.trainer.metrics import Report
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import collect, credit, train_step

MATCHING = ("awm", "diffusion-nft", "dgpo", "crd")


def assemble(models, tmp_path, method, **changes):
    doc = document(models, "image", tmp_path / "run", method=method, **changes)
    config = load_config(doc)
    return build.assemble(config), config


def shake(parts):
    """Move the weights, so that they differ from their average."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parts.policy.network.parameters():
            parameter.add_(parameter.std().nan_to_num() * 0.05 * torch.randn_like(parameter))


# -- decay ----------------------------------------------------------------------------------------


def test_the_published_decays():
    first = OldPolicy(slope=0.001, limit=0.5)
    assert [first.decay(n) for n in (1, 100, 500, 9000)] == pytest.approx([0.001, 0.1, 0.5, 0.5])
    second = OldPolicy(slope=0.0075, limit=0.999, delay=75)
    assert [second.decay(n) for n in (1, 75, 85, 500)] == pytest.approx([0, 0, 0.075, 0.999])
    third = OldPolicy(first=0.25, slope=0.001, limit=0.5)
    assert [third.decay(n) for n in (1, 50, 900)] == pytest.approx([0.251, 0.3, 0.5])


def test_the_average_follows_its_decay():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average, wanted = Ema(network, OldPolicy(first=0.2, slope=0.1, limit=0.45).decay), 0.0
    for value, decay in zip((1.0, 2.0, 3.0, 4.0), (0.3, 0.4, 0.45, 0.45), strict=True):
        nn.init.constant_(network.weight, value)
        average.update()
        wanted = decay * wanted + (1 - decay) * value
    assert average.state_dict()["weight"].item() == pytest.approx(wanted)


def test_without_a_limit_there_is_no_average(models, tmp_path):
    parts, _ = assemble(models, tmp_path, "dgpo")
    assert parts.old is None
    assert set(parts.second_weights) == {"reference"}


# -- who samples ----------------------------------------------------------------------------------


def test_the_average_draws_the_samples_where_the_method_says_so(models, tmp_path):
    for name, samples in (("diffusion-nft", True), ("awm", False)):
        parts, config = assemble(models, tmp_path / name, name)
        shake(parts)
        collected = collect(parts, State(), config, Report())
        drawn = collected.trajectories.payload.clean

        def generate(parts=parts, config=config):
            prompts = parts.prompts.batch(0, config.rollout.prompts_per_step)
            seed = mix_seed(config.seed, 0)
            size = config.rollout.group_size
            rollout = parts.engine.generate(prompts, group_size=size, seed=seed)
            return rollout.trajectories.payload.clean

        with parts.old.applied():
            averaged = generate()
        assert torch.equal(drawn, averaged) == samples
        assert torch.equal(drawn, generate()) != samples


def test_what_is_recorded_under_which_weights(models, tmp_path):
    """The old policy's numbers once where it drew the samples; the reference's beside them."""
    for name, samples, calls in (("diffusion-nft", True, 2), ("awm", False, 3)):
        parts, config = assemble(models, tmp_path / name, name)
        shake(parts)
        report = Report()
        plain = collect(parts, State(), config, report).trajectories
        before = parts.policy.forwards
        found = credit(parts, plain, config, report)
        assert parts.policy.forwards - before == calls
        with torch.no_grad(), parts.policy.reference():
            reference = parts.policy.evaluate(plain, Request(prediction=True))
        assert torch.equal(found.ref_prediction, reference.prediction)
        with torch.no_grad():
            last = parts.policy.evaluate(plain, Request(prediction=True))
            with parts.old.applied():
                old = parts.policy.evaluate(plain, Request(prediction=True))
        assert torch.equal(found.old_prediction, old.prediction)
        assert torch.equal(found.old_log_prob, (old if samples else last).log_prob)
        assert not torch.equal(old.log_prob, last.log_prob)


@pytest.mark.parametrize("name", MATCHING)
def test_before_the_first_update_the_ratio_is_1_to_the_last_bit(models, tmp_path, name):
    """Recorded and trained in equal pieces; the averages start at the weights."""
    parts, config = assemble(models, tmp_path, name, trainer={"micro_batch_size": 4})
    state = State()
    train_step(parts, state, config)
    assert state.metrics["ratio/first_max_deviation"] == 0
    assert state.metrics["clip_fraction"] == 0
    assert state.metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", MATCHING)
def test_later_updates_are_off_policy_and_finite(models, tmp_path, name):
    parts, config = assemble(
        models, tmp_path, name, trainer={"epochs": 2, "minibatches": 2, "learning_rate": 1e-3}
    )
    state = State()
    for _ in range(2):
        train_step(parts, state, config)
    assert abs(state.metrics["ratio/mean"] - 1) > 1e-7
    assert state.metrics["grad_norm"] > 0


# -- what makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rollout": {"matching": {"draws": 0}}}, "would be no decision"),
        ({"rollout": {"matching": {"weight": "cubic"}}}, "generalised_huber"),
        ({"rollout": {"old": {"limit": 1.0}}}, "less than 1"),
        ({"regulariser": {"kl": {"estimator": "exact"}}}, "it is 'velocity'"),
        ({"regulariser": {"entropy": 0.1}}, "entropy"),
        ({"modalities": None}, "unknown slot"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(MethodError, match=message):
        load_method("diffusion-nft", **overrides)


def test_denoising_decisions_cannot_be_matched():
    with pytest.raises(MethodError, match=r"rollout\.matching"):
        load_method("flow-grpo", objective="negative_aware", trust_region=None)


def test_more_levels_than_steps_are_refused(models, tmp_path):
    method = {"id": "diffusion-nft", "rollout": {"matching": {"draws": 5}}}
    with pytest.raises(MethodError, match="does not have 5 noise levels"):
        assemble(models, tmp_path, method)
