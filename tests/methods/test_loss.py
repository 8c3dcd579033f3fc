"""The loss: terms that presets leave out, types, metrics, and what is missing."""

import pytest
import torch
from method_batches import (
    GARBAGE,
    PRESETS,
    Batch,
    evaluate,
    load_method,
    loss_and_gradient,
    make_batch,
)

from mmgrpo.core import Trajectories
from mmgrpo.protocols import Evaluation


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def one_row(log_prob, old, **fields):
    """One prepared sample with advantage 1 everywhere."""
    old = tensor(old)
    return Trajectories(
        group=torch.zeros(1),
        mask=torch.ones_like(old),
        old_log_prob=old,
        advantage=fields.pop("advantage", torch.ones_like(old)),
        **fields,
    ), tensor(log_prob).requires_grad_()


def test_a_given_advantage_is_enough():
    t, log_prob = one_row([-1.0, -2.0], [-1.0, -2.0])
    output = load_method("dr-grpo").loss(log_prob, t)
    assert output.loss.item() == -1
    assert output.loss.dtype == torch.float64


def test_without_an_advantage_prepare_is_named():
    t, log_prob = one_row([-1.0], [-1.0], advantage=None)
    with pytest.raises(ValueError, match=r"method\.prepare"):
        load_method("dr-grpo").loss(log_prob, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_log_probabilities_are_computed_with_in_float32(dtype):
    t, log_prob = one_row([-1.0, -2.0], [-1.1, -2.0])
    half = log_prob.detach().to(dtype).requires_grad_()
    output = load_method("dr-grpo").loss(half, t)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_has_the_type_of_the_log_probabilities(name):
    """Also where rewards are float32 and log-probabilities float64."""
    method, batch = load_method(name), make_batch(0)
    t = batch.trajectories
    single = t.replace(rewards={"score": t.rewards["score"].float()})
    assert loss_and_gradient(method, Batch(single, batch.log_prob))[0].loss.dtype == torch.float64
    low = make_batch(0, torch.float32)
    assert loss_and_gradient(method, low)[0].loss.dtype == torch.float32


# -- regularisers ---------------------------------------------------------------------------------

BARE = {"regulariser": None, "aggregate": "token_mean"}


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", 0.2, 1.0), ("k2", 0.02, 0.2), ("k3", 0.0187308, 0.1812692)],
)
def test_a_kl_to_the_reference(estimator, value, slope):
    t, log_prob = one_row([-1.0], [-1.0], ref_log_prob=tensor([-1.2]), advantage=tensor([0.0]))
    kl = {"estimator": estimator, "coefficient": 0.5}
    output = load_method("grpo", aggregate="token_mean", regulariser={"kl": kl}).loss(log_prob, t)
    assert output.metrics["kl"] == pytest.approx(value, rel=1e-5)
    assert output.loss.item() == pytest.approx(0.5 * value, rel=1e-5)
    assert torch.autograd.grad(output.loss, log_prob)[0].item() == pytest.approx(0.5 * slope)


def test_a_kl_to_the_old_policy_and_straight_through():
    t, log_prob = one_row([-1.0], [-1.2], advantage=tensor([0.0]))
    kl = {"estimator": "k3", "coefficient": 1.0, "target": "old", "gradient": "k2"}
    output = load_method("grpo", regulariser={"kl": kl}).loss(log_prob, t)
    assert output.loss.item() == pytest.approx(0.0187308, rel=1e-5)
    assert torch.autograd.grad(output.loss, log_prob)[0].item() == pytest.approx(0.2)


def test_the_policys_own_divergence():
    t, log_prob = one_row([-1.0, -1.0], [-1.0, -1.0])
    evaluation = Evaluation(log_prob=log_prob, divergence=(log_prob + 3) ** 2)
    output = load_method("flow-grpo").loss(log_prob, t, evaluation=evaluation)
    assert output.metrics["kl"] == pytest.approx(4)
    assert output.loss.item() == pytest.approx(-1 + 0.04 * 4)
    slope = torch.autograd.grad(output.loss, log_prob)[0]
    assert slope.tolist() == [pytest.approx([(-1 + 0.04 * 4) / 2] * 2)]


def test_an_entropy_bonus_raises_the_entropy():
    t, log_prob = one_row([-1.0], [-1.0], advantage=tensor([0.0]))
    evaluation = Evaluation(log_prob=log_prob, entropy=-2 * log_prob)
    method = load_method("dr-grpo", regulariser={"entropy": 0.1})
    output = method.loss(log_prob, t, evaluation=evaluation)
    assert output.metrics["entropy"] == 2
    assert output.loss.item() == pytest.approx(-0.2)
    assert torch.autograd.grad(output.loss, log_prob)[0].item() == pytest.approx(0.2)


def test_entropy_is_logged_wherever_the_evaluation_has_it():
    batch = make_batch()
    method = load_method("dr-grpo")
    prepared = method.prepare(batch.trajectories)
    entropy = torch.where(prepared.mask, 0.5, GARBAGE)
    evaluation = Evaluation(log_prob=batch.log_prob, entropy=entropy)
    output = method.loss(batch.log_prob, prepared, evaluation=evaluation)
    assert output.metrics["entropy"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "overrides", "missing"),
    [
        ("grpo", {}, "ref_log_prob"),
        ("flow-grpo", {}, "divergence"),
        ("dr-grpo", {"regulariser": {"entropy": 0.1}}, "entropy"),
        ("dr-grpo", {"ratio": "segment"}, "segment"),
        ("grpo", {"regulariser": {"kl": {"target": "old"}}}, "old_log_prob"),
    ],
)
def test_what_is_missing_is_named(name, overrides, missing):
    t, log_prob = one_row([-1.0], [-1.0])
    if missing == "old_log_prob":
        t = t.replace(old_log_prob=None)
    with pytest.raises(ValueError, match=missing):
        load_method(name, **overrides).loss(log_prob, t)


def test_rewards_in_which_the_reference_is_missing():
    t = Trajectories(group=torch.zeros(2), mask=torch.ones(2, 1), reward=torch.tensor([1.0, 0]))
    with pytest.raises(ValueError, match="ref_log_prob"):
        load_method("rloo").prepare(t)


# -- the engine's own probabilities ---------------------------------------------------------------


def mismatched(**correction):
    t, log_prob = one_row([-1.0] * 3, [-1.0] * 3, ref_log_prob=tensor([-1.0, -1.2, -0.8]))
    mismatch = tensor([0.5, -0.2, 1.2])
    t = t.replace(rollout_log_prob=t.old_log_prob - mismatch)
    method = load_method("grpo", correction=correction or None)
    output = method.loss(log_prob, t)
    return output, torch.autograd.grad(output.loss, log_prob)[0][0]


def test_the_correction_weighs_the_surrogate_but_not_the_kl():
    _, plain = mismatched()
    _, weighted = mismatched(name="truncated", cap=2.0)
    bare = (plain - torch.tensor([0, 0.0072508, -0.0088561])) * 3  # less 0.04 (1 - exp(-d)) / 3
    assert bare.tolist() == pytest.approx([-1] * 3, abs=0.05)
    kl = plain + 1 / 3
    weights = tensor([1.6487, 0.8187, 2.0])[0]
    torch.testing.assert_close(weighted, kl - weights / 3, rtol=1e-4, atol=1e-5)


def test_a_rejected_sample_keeps_only_its_kl():
    _, plain = mismatched()
    output, rejected = mismatched(name="geometric_rejection")
    torch.testing.assert_close(rejected, plain + 1 / 3)
    assert output.metrics["ratio/mean"] == 1


def test_without_a_separate_engine_a_correction_changes_nothing():
    batch = make_batch()
    _, wanted = loss_and_gradient(load_method("grpo"), batch)
    _, found = loss_and_gradient(load_method("grpo", correction="masked"), batch)
    assert torch.equal(found, wanted)


# -- metrics --------------------------------------------------------------------------------------


def test_metrics_are_means_over_trained_decisions():
    method, batch = load_method("dr-grpo"), make_batch()
    output, _ = loss_and_gradient(method, batch)
    t = batch.trajectories
    gap = (batch.log_prob - t.old_log_prob)[t.mask]
    assert output.metrics["ratio/mean"] == pytest.approx(gap.exp().mean().item())
    exact = (gap.exp() - 1 - gap).mean().item()
    assert output.metrics["policy/approximate_kl"] == pytest.approx(exact)
    assert output.max_log_ratio == pytest.approx(gap.abs().max().item())
    a = method.prepare(t).advantage[t.mask]
    cut = ((a > 0) & (gap.exp() > 1.2)) | ((a < 0) & (gap.exp() < 0.8))
    assert output.metrics["clip_fraction"] == pytest.approx(cut.double().mean().item())


def test_the_mean_ratio_is_at_the_methods_level():
    t, log_prob = one_row([-0.9, -0.4, -1.2], [-1.0, -1.0, -1.0])  # the gspo card's numbers
    output = load_method("gspo").loss(log_prob, t)
    assert output.metrics["ratio/mean"] == pytest.approx(1.1814, abs=5e-5)
    assert output.metrics["clip_fraction"] == 1
    assert output.loss.item() == pytest.approx(-1.0004)


def test_a_batch_of_no_samples_is_a_zero():
    method, batch = load_method("grpo"), make_batch()
    prepared = method.prepare(batch.trajectories).select(torch.tensor([], dtype=torch.int64))
    log_prob = batch.log_prob[:0].requires_grad_()
    output = method.loss(log_prob, prepared, evaluation=evaluate(method, log_prob, prepared))
    assert output.loss.item() == 0
    assert output.max_log_ratio == 0
