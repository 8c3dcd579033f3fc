"""DDPO, DPOK and LOOP: worked numbers, and what they reduce to."""

import pytest
import torch
from method_batches import Batch, load_method, loss_and_gradient, make_batch, relative_error

from mmgrpo.core import Trajectories
from mmgrpo.core.groups import group_mean, group_std


def advantage(name, trajectories, **overrides):
    return load_method(name, **overrides).prepare(trajectories).advantage


def test_worked_leave_one_out_advantages_of_loop():
    trajectories = Trajectories(
        group=torch.zeros(4), mask=torch.ones(4, 2), reward=torch.tensor([1.0, 3, 2, 6])
    )
    found = advantage("loop", trajectories)
    assert found[:, 0].tolist() == pytest.approx([-8 / 3, 0, -4 / 3, 4])
    assert torch.equal(found[:, 0], found[:, 1])


def test_a_history_of_the_group_alone_makes_ddpo_a_group_z_score():
    trajectories = make_batch().trajectories
    reward, group = trajectories.rewards["score"], trajectories.group
    own = trajectories.replace(
        history_mean=group_mean(reward, group), history_std=group_std(reward, group, ddof=0)
    )
    wanted = advantage("dance-grpo", trajectories, advantage={"ddof": 0, "eps": 1e-6})
    torch.testing.assert_close(advantage("ddpo", own), wanted)


def test_without_a_history_ddpo_is_a_z_score_of_the_whole_update():
    trajectories = make_batch().trajectories.replace(history_mean=None, history_std=None)
    reward = trajectories.rewards["score"]
    wanted = (reward - reward.mean()) / (reward.std(correction=0) + 1e-6)
    found = advantage("ddpo", trajectories)
    rows, steps = trajectories.mask.nonzero(as_tuple=True)
    torch.testing.assert_close(found[rows, steps], wanted[rows].clamp(-5, 5))


def test_a_known_history_is_used_and_an_unknown_one_is_not():
    nan = torch.nan
    trajectories = Trajectories(
        group=torch.tensor([0, 1, 2, 2]),
        mask=torch.ones(4, 1),
        reward=torch.tensor([1.0, 0.0, 3.0, 0.0]),
        history_mean=torch.tensor([0.5, nan, 2.5, 2.5]),
        history_std=torch.tensor([0.25, nan, 0.01, 0.01]),
    )
    found = advantage("ddpo", trajectories)[:, 0].tolist()
    update_std = torch.tensor([1.0, 0, 3, 0]).std(correction=0).item()
    assert found == pytest.approx([2.0, -1 / update_std, 5.0, -5.0], rel=1e-4)  # clamped at 5


def test_ddpo_starts_as_reinforce():
    batch = make_batch(on_policy=True)
    plain = load_method("ddpo", objective="reinforce", trust_region=None)
    _, found = loss_and_gradient(load_method("ddpo"), batch)
    _, wanted = loss_and_gradient(plain, batch)
    assert relative_error(found, wanted) < 1e-12


def test_dpok_weighs_rewards_by_ten_and_sums_over_the_steps():
    trajectories = make_batch().trajectories
    batch = Batch(trajectories.replace(ref_log_prob=trajectories.old_log_prob), None)
    batch = Batch(batch.trajectories, trajectories.old_log_prob)
    output, gradient = loss_and_gradient(load_method("dpok"), batch)
    reward = trajectories.rewards["score"][:, None] * trajectories.mask
    wanted = -10 * reward / len(trajectories)
    torch.testing.assert_close(gradient, wanted)  # at the reference the KL pulls nowhere
    assert output.metrics["kl"] == 0
