"""What must not matter to any preset, and what must count once, or not at all."""

import math
from dataclasses import replace

import pytest
import torch
from method_batches import (
    GARBAGE,
    PRESETS,
    VARIANTS,
    Batch,
    load_method,
    load_variant,
    loss_and_gradient,
    make_batch,
    relative_error,
)

from mmgrpo.core import Trajectories, denominators
from mmgrpo.methods.components import with_default

COMPARING = [name for name in PRESETS if "groups" in load_method(name).needs]
PAIRING = [name for name in PRESETS if "pairs" in load_method(name).needs]
SHIFTABLE = [
    name
    for name in COMPARING
    if not load_method(name).reward.shaping and load_method(name).advantage.scale != "mean"
]
"""Dividing by the mean reward is the one scale that sees where zero is."""


def assert_same(found, wanted, columns=slice(None)):
    (one, gradient), (other, expected) = found, wanted
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-9, abs=1e-12)
    assert relative_error(gradient[:, columns], expected) < 1e-9
    assert gradient.sum().item() == pytest.approx(expected.sum().item(), rel=1e-7, abs=1e-10)


def load(name):
    """With a fixed length limit where the loss is divided by one, as the trainer sets it."""
    method = load_variant(name)
    return replace(method, aggregate=with_default(method.aggregate, length=6))


def widened(batch, extra=3):
    """More padding on the right, filled with garbage."""

    def pad(x, value):
        more = torch.full((len(x), extra, *x.shape[2:]), value, dtype=x.dtype)
        return torch.cat([x, more], dim=1)

    t = batch.trajectories
    return Batch(
        t.replace(
            mask=pad(t.mask, False),
            old_log_prob=pad(t.old_log_prob, GARBAGE),
            ref_log_prob=pad(t.ref_log_prob, GARBAGE),
            segment=pad(t.segment, 0),
            step_std=pad(t.step_std, 0.0),
            step_length=pad(t.step_length, GARBAGE),
            entropy_weight=pad(t.entropy_weight, GARBAGE),
            old_prediction=pad(t.old_prediction, GARBAGE),
            ref_prediction=pad(t.ref_prediction, GARBAGE),
            target=pad(t.target, GARBAGE),
            sigma=pad(t.sigma, GARBAGE),
        ),
        pad(batch.log_prob, GARBAGE),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_padding_does_not_matter(name):
    method, batch = load(name), make_batch(5)
    wanted = loss_and_gradient(method, batch)
    assert_same(loss_and_gradient(method, widened(batch)), wanted, slice(0, 6))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", PRESETS)
def test_what_lies_off_the_mask_reaches_neither_loss_nor_gradient(name, value):
    method, batch = load(name), make_batch(6)
    t, off = batch.trajectories, ~batch.trajectories.mask
    spoiled = Batch(
        t.replace(
            old_log_prob=t.old_log_prob.masked_fill(off, value),
            ref_log_prob=t.ref_log_prob.masked_fill(off, -value),
            rollout_log_prob=t.old_log_prob.masked_fill(off, value),
            step_reward=torch.zeros_like(t.old_log_prob).masked_fill(off, value),
        ),
        batch.log_prob.masked_fill(off, value),
    )
    prepared = method.prepare(spoiled.trajectories)
    outside = prepared.advantage.masked_fill(~prepared.mask, value)
    found = loss_and_gradient(method, spoiled, prepared.replace(advantage=outside))
    assert_same(found, loss_and_gradient(method, batch))
    assert (found[1][off] == 0).all()
    assert all(math.isfinite(x) for x in found[0].metrics.values())
    assert math.isfinite(found[0].max_log_ratio)


@pytest.mark.parametrize("name", SHIFTABLE)
def test_a_constant_added_to_the_rewards_of_a_group_does_not_matter(name):
    """Scales over the whole batch see between-group spread, so the constant is common there."""
    method, batch = load_method(name), make_batch(7)
    t = batch.trajectories
    batchwise = method.advantage.scale == "batch"
    shift = 3.0 if batchwise else (t.group % 5).double()
    moved = t.replace(rewards={"score": t.rewards["score"] + shift})
    torch.testing.assert_close(
        method.prepare(moved).advantage, method.prepare(t).advantage, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COMPARING)
def test_equal_rewards_with_float_noise_give_no_advantage_at_all(name, dtype):
    method, batch = load_method(name), make_batch(8, dtype)
    noise = torch.linspace(-1e-9, 1e-9, len(batch.trajectories), dtype=dtype)
    t = batch.trajectories.replace(rewards={"score": 0.7 + noise})
    if method.reward.kl:
        t = t.replace(ref_log_prob=t.old_log_prob)
    assert (method.prepare(t).advantage == 0).all()


@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_a_sample_to_which_no_reward_applies_is_as_good_as_absent(name):
    method, batch = load(name), make_batch(9)
    t = batch.trajectories
    gone = torch.tensor([1, 6])
    score = t.rewards["score"].clone()
    score[gone] = math.nan
    rest = torch.tensor([i for i in range(len(t)) if i not in gone])
    with_gap = Batch(t.replace(rewards={"score": score}), batch.log_prob)
    without = Batch(t.select(rest), batch.log_prob[rest])
    prepared = method.prepare(with_gap.trajectories)
    assert (prepared.advantage[gone] == 0).all()
    assert not prepared.mask[gone].any()
    output, gradient = loss_and_gradient(method, with_gap, prepared)
    wanted, expected = loss_and_gradient(method, without)
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-10)
    assert relative_error(gradient[rest], expected) < 1e-10
    assert (gradient[gone] == 0).all()


@pytest.mark.parametrize("name", [name for name in SHIFTABLE if name not in PAIRING])
def test_a_group_of_one_has_its_reward_as_advantage(name):
    """Baseline 0 and scale 1, unless the method takes out or rescales what has no spread."""
    method = load_method(
        name, regulariser=None, reward=None, filter=None, credit=None,
        advantage={"clip": None, "valid_group_factor": None, "whiten": None,
                   "eps": 0.0},
    )  # fmt: skip
    one = torch.ones(1, 3)
    t = Trajectories(
        group=torch.zeros(1), mask=one, reward=torch.tensor([0.7]).double(),
        step_std=one, step_length=one,
    )  # fmt: skip
    assert method.prepare(t).advantage[0].tolist() == pytest.approx([0.7] * 3, rel=2e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_when_nothing_is_left_to_train_loss_and_gradient_are_zero(name):
    method, batch = load_method(name), make_batch(10)
    t = batch.trajectories
    nothing = Batch(t.replace(mask=torch.zeros_like(t.mask)), batch.log_prob)
    unscored = Batch(
        t.replace(rewards={"score": torch.full_like(t.rewards["score"], math.nan)}), batch.log_prob
    )
    for case in (nothing, unscored):
        output, gradient = loss_and_gradient(method, case)
        assert output.loss.item() == 0
        assert (gradient == 0).all()
        assert all(value == 0 for value in output.metrics.values())


EMPTYING = [n for n in PRESETS if {f for f, _ in load_method(n).filters} - {"prune_leaves"}]
"""Presets with a filter that can take out a whole batch; pruning always keeps some leaves."""


@pytest.mark.parametrize("name", EMPTYING)
def test_a_batch_that_the_filters_empty_has_a_zero_loss_that_can_be_differentiated(name):
    method, batch = load_method(name), make_batch(11)
    t = batch.trajectories
    flat = t.replace(rewards={"score": torch.full_like(t.rewards["score"], 0.3)})
    prepared = method.prepare(flat)
    assert not prepared.mask.any()
    assert len(prepared) == len(t)
    assert denominators(prepared).sequences >= 1
    output, gradient = loss_and_gradient(method, Batch(flat, batch.log_prob), prepared)
    assert output.loss.item() == 0
    assert output.loss.requires_grad
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", PRESETS)
def test_extreme_log_probabilities_stay_finite(name):
    method, batch = load_method(name), make_batch(12, torch.float32)
    extreme = batch.log_prob.clone()
    extreme[0] = -1e4
    extreme[4] = 1e4
    output, gradient = loss_and_gradient(method, Batch(batch.trajectories, extreme))
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


# -- shared decisions -----------------------------------------------------------------------------


def tree(dtype=torch.float64):
    """Two rows of a group share their first two decisions; a third row stands alone."""
    old = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -2.0, -0.7], [-1.2, -0.3, -0.9]], dtype=dtype)
    step = torch.tensor([[1e-5, 0.5, -0.4], [1e-5, 0.5, 0.4], [0.6, -0.5, 2e-5]], dtype=dtype)
    t = Trajectories(
        group=torch.zeros(3, dtype=torch.int64),
        mask=torch.ones(3, 3),
        node=torch.tensor([[0, 1, 2], [0, 1, 3], [4, 5, 6]]),
        old_log_prob=old,
        ref_log_prob=old + 0.2,
        rewards={"score": torch.tensor([1.0, 0.25, 0.0], dtype=dtype)},
        baseline_reward=torch.full((3,), 0.5, dtype=dtype),
        segment=torch.zeros(3, 3, dtype=torch.int64),
        step_std=torch.full((3, 3), 0.1, dtype=dtype),
        step_length=torch.full((3, 3), 0.5, dtype=dtype),
    )
    return Batch(t, old + step)


COUNTING_DECISIONS = [
    name
    for name in PRESETS
    if load_method(name).component("ratio") == "token"
    and load_method(name).component("aggregate") != "sequence_mean_token_mean"
    and not load_method(name).rollout.matching.on  # no two rows share a draw on a clean sample
]


@pytest.mark.parametrize("name", COUNTING_DECISIONS)
def test_a_shared_decision_counts_once(name):
    method, batch = load(name), tree()
    prepared = method.prepare(batch.trajectories)
    assert torch.equal(prepared.advantage[0, :2], prepared.advantage[1, :2])
    once = prepared.replace(weight=None, node=None, mask=prepared.mask.clone())
    once.mask[1, :2] = False  # the copies of the second row
    assert denominators(prepared).decisions == denominators(once).decisions == 7
    output, gradient = loss_and_gradient(method, batch, prepared)
    wanted, expected = loss_and_gradient(method, batch, once)
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)
    merged = gradient.clone()
    merged[0, :2] += merged[1, :2]
    merged[1, :2] = 0
    torch.testing.assert_close(merged, expected)
    assert output.metrics == pytest.approx(wanted.metrics)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PAIRING])
def test_shared_decisions_have_half_the_weight_in_each_row(name):
    prepared = load_method(name).prepare(tree().trajectories)
    assert prepared.weight.tolist() == [[0.5, 0.5, 1], [0.5, 0.5, 1], [1, 1, 1]]
    assert prepared.weight.dtype == torch.float64


def test_a_shared_decision_carries_the_mean_of_its_rows():
    prepared = load_method("dr-grpo").prepare(tree().trajectories)
    own = [1 - 1.25 / 3, 0.25 - 1.25 / 3]
    assert prepared.advantage[0].tolist() == pytest.approx([sum(own) / 2] * 2 + own[:1])
    assert prepared.advantage[1].tolist() == pytest.approx([sum(own) / 2] * 2 + own[1:])


def test_whitening_counts_a_shared_decision_once():
    prepared = load_method("reinforce-pp-baseline").prepare(tree().trajectories)
    weighted = prepared.advantage * prepared.weight
    assert weighted.sum().item() == pytest.approx(0, abs=1e-12)
    assert (weighted * prepared.advantage).sum().item() == pytest.approx(7)


def test_a_copy_that_a_filter_takes_out_leaves_the_other_with_full_weight():
    method = load_method("grpo", filter=["truncated"], regulariser=None)
    t = tree().trajectories.replace(truncated=torch.tensor([True, False, False]))
    assert method.prepare(t).weight.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 1]]


def test_a_given_weight_is_kept():
    weight = torch.full((3, 3), 0.25, dtype=torch.float64)
    prepared = load_method("dr-grpo").prepare(tree().trajectories.replace(weight=weight))
    assert torch.equal(prepared.weight, weight)
