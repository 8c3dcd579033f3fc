"""Pairs in whole methods: who is compared, who leaves, what the methods reduce to."""

import dataclasses
import math

import pytest
import torch
from method_batches import Batch, load_method, loss_and_gradient, make_batch, relative_error

from mmgrpo.core import Trajectories
from mmgrpo.errors import MethodError

PAIRING = ("d3po", "diffusion-dpo", "seppo")


def batch_of(*, rewards, mask=None, size=4, length=3, seed=0, groups=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * size, length)
    ref = -torch.rand(*shape, generator=generator, dtype=torch.float64)
    moved = 0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    trajectories = Trajectories(
        group=torch.arange(groups).repeat_interleave(size),
        mask=torch.ones(shape, dtype=torch.bool) if mask is None else torch.tensor(mask).bool(),
        old_log_prob=ref + moved,
        ref_log_prob=ref,
        rewards={name: torch.tensor(value).double() for name, value in rewards.items()},
        truncated=torch.zeros(groups * size, dtype=torch.bool),
    )
    return Batch(trajectories, ref + moved)


def pairs_of(method, batch):
    return {tuple(pair) for pair in method.prepare(batch.trajectories).pairs.tolist()}


# -- who is compared ------------------------------------------------------------------------------


def test_the_weights_of_the_rewards_decide_what_is_better():
    method = load_method("d3po")
    batch = batch_of(rewards={"good": [4.0, 3, 2, 1], "cost": [0.0, 3, 1, 2]})
    assert pairs_of(method, batch) == {(1, 3)}  # nothing is better than 0 or worse in both
    cheap = dataclasses.replace(method, reward_weights={"good": 1.0, "cost": -1.0})
    assert pairs_of(cheap, batch) == {(0, 3)}  # 1 is better than 2 and dearer


def test_rows_without_a_pair_are_not_trained():
    method = load_method("diffusion-dpo")
    batch = batch_of(rewards={"r": [0.1, 0.9, 0.5, 0.4]})
    prepared = method.prepare(batch.trajectories)
    assert prepared.pairs.tolist() == [[1, 0]]
    assert prepared.advantage[:, 0].tolist() == [-1, 1, 0, 0]
    assert prepared.mask.any(dim=1).tolist() == [True, True, False, False]
    _, gradient = loss_and_gradient(method, batch, prepared)
    assert (gradient[2:] == 0).all()
    assert (gradient[1] < 0).all()
    assert (gradient[0] > 0).all()


@pytest.mark.parametrize("name", PAIRING)
def test_ties_train_nothing(name):
    method = load_method(name)
    output, gradient = loss_and_gradient(method, batch_of(rewards={"r": [0.5] * 4}))
    assert output.loss == 0
    assert (gradient == 0).all()


def test_filtered_samples_and_those_without_a_reward_are_passed_over():
    method = load_method("diffusion-dpo", filter=["truncated"])
    batch = batch_of(rewards={"r": [0.9, 0.8, math.nan, 0.1]})
    truncated = torch.tensor([True, False, False, False])
    prepared = method.prepare(batch.trajectories.replace(truncated=truncated))
    assert prepared.pairs.tolist() == [[1, 3]]


def test_steps_that_a_partner_lacks_leave_the_mask():
    mask = [[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]]
    batch = batch_of(rewards={"r": [0.9, 0.1, 0.8, 0.2]}, mask=mask)
    steps = load_method("d3po").prepare(batch.trajectories)
    assert steps.mask.tolist() == [
        [False, True, False], [False, True, False], [True, False, False], [True, False, False],
    ]  # fmt: skip
    whole = load_method("d3po", objective="preference").prepare(batch.trajectories)
    assert torch.equal(whole.mask, batch.trajectories.mask)


def test_a_whole_sample_counts_once_whatever_its_length():
    """The mean over pairs, of samples of 3 and 1 and of 2 and 3 decisions."""
    mask = [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    batch = batch_of(rewards={"r": [0.9, 0.1, 0.8, 0.2]}, mask=mask)
    method = load_method("d3po", objective={"name": "preference", "beta": 5.0})
    t = batch.trajectories
    score = ((batch.log_prob - t.ref_log_prob) * t.mask).sum(dim=1).tolist()
    wanted = [math.log1p(math.exp(-5.0 * (score[w] - score[r]))) for w, r in ((0, 1), (2, 3))]
    output, _ = loss_and_gradient(method, batch)
    assert output.loss.item() == pytest.approx(sum(wanted) / 2, rel=1e-12)


# -- reductions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRING)
def test_the_other_order_of_preference_turns_the_gradient_at_the_reference(name):
    method = load_method(name)
    batch = batch_of(rewards={"r": [0.1, 0.9, 0.5, 0.4]})
    t = batch.trajectories
    start = Batch(t.replace(old_log_prob=t.ref_log_prob), t.ref_log_prob)
    turned = Batch(start.trajectories.replace(rewards={"r": -t.rewards["r"]}), t.ref_log_prob)
    output, gradient = loss_and_gradient(method, start)
    other, opposite = loss_and_gradient(method, turned)
    assert output.loss.item() == pytest.approx(math.log(2)) == other.loss.item()
    assert gradient.norm() > 0
    torch.testing.assert_close(opposite, -gradient)


def test_d3po_on_one_step_without_its_clip_is_dpo():
    batch = batch_of(rewards={"r": [0.1, 0.9, 0.5, 0.4]}, length=1)
    _, steps = loss_and_gradient(load_method("d3po", objective={"clip": None}), batch)
    dpo = load_method("d3po", objective={"name": "preference", "beta": 0.1})
    assert relative_error(loss_and_gradient(dpo, batch)[1], steps) < 1e-12


def test_diffusion_dpo_and_d3po_without_its_clip_are_one_loss():
    batch = make_batch(2)
    same = load_method("d3po", objective={"clip": None, "beta": 1000.0}, pairs="best_worst")
    wanted, expected = loss_and_gradient(load_method("diffusion-dpo"), batch)
    found, gradient = loss_and_gradient(same, batch)
    assert found.loss == wanted.loss
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("flip", ["sign", "drop"])
def test_seppo_is_diffusion_dpo_while_the_reference_is_worse_on_the_preferred(flip):
    batch = batch_of(rewards={"r": [0.1, 0.9, 0.5, 0.4]})
    t = batch.trajectories
    log_prob = batch.log_prob.clone()
    log_prob[1] = t.ref_log_prob[1] + 1e-3
    batch = Batch(t, log_prob)
    seppo = load_method("seppo", objective={"flip": flip})
    wanted, expected = loss_and_gradient(load_method("diffusion-dpo"), batch)
    found, gradient = loss_and_gradient(seppo, batch)
    assert found.loss == wanted.loss
    assert torch.equal(gradient, expected)


def test_where_the_reference_is_better_seppo_learns_from_both_or_from_one():
    batch = batch_of(rewards={"r": [0.1, 0.9, 0.5, 0.4]})
    t = batch.trajectories
    log_prob = batch.log_prob.clone()
    log_prob[1] = t.ref_log_prob[1] - 1e-3
    batch = Batch(t, log_prob)
    _, both = loss_and_gradient(load_method("seppo"), batch)
    assert (both[:2] < 0).all()  # the likelihood of both rises
    _, one = loss_and_gradient(load_method("seppo", objective={"flip": "drop"}), batch)
    assert (one[1] < 0).all()
    assert (one[0] == 0).all()


# -- what makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("d3po", {"pairs": None}, "compares pairs, and none are chosen; set pairs to one of best"),
        ("grpo", {"pairs": "best_worst"}, "pairs has no effect with objective 'policy_gradient'"),
        ("d3po", {"pairs": "best_wrst"}, "unknown pairs 'best_wrst'; did you mean 'best_worst'"),
        ("diffusion-dpo", {"rollout.matching.shared": False}, "set rollout.matching.shared"),
        ("dapo", {"rollout.drawn_by": "reference"}, "nothing in the method compares with one"),
        ("d3po", {"objective.clip": 2.0}, "clip must be in"),
        ("seppo", {"objective.flip": "turn"}, "Input should be 'sign' or 'drop'"),
        ("seppo", {"reference.size": 0}, "greater than or equal to 1"),
        ("d3po", {"trust_region": "ppo_clip"}, "trust_region has no effect"),
    ],
)
def test_choices_that_contradict_each_other_are_one_sentence(name, overrides, message):
    with pytest.raises(MethodError, match=message):
        load_method(name, **overrides)


@pytest.mark.parametrize("name", PAIRING)
def test_what_they_need(name):
    assert load_method(name).needs == {"ref_log_prob", "groups", "whole_groups", "pairs"}
