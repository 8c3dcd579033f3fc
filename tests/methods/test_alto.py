"""ALTo's own numbers: two answers that nearly tie move little, and the ratio is 1 in value only."""

import pytest
import torch

from mmgrpo.core import Trajectories
from mmgrpo.methods import load_method

REWARDS = torch.tensor([1.2200, 1.2720], dtype=torch.float64)


def prepared(**overrides):
    return load_method("alto", **overrides).prepare(
        Trajectories(
            group=torch.zeros(2, dtype=torch.int64),
            mask=torch.tensor([[True, True, True], [True, False, False]]),
            rewards={"mask_tokens": REWARDS},
            ref_log_prob=torch.zeros(2, 3, dtype=torch.float64),
        )
    )


def test_the_published_advantages():
    assert REWARDS.std().item() == pytest.approx(0.0368, abs=5e-5)
    advantage = prepared().advantage
    assert advantage[0].tolist() == pytest.approx([-0.1900] * 3, abs=5e-5)
    assert advantage[1, 0].item() == pytest.approx(0.1900, abs=5e-5)


def test_without_the_additive_tenth_it_is_the_z_score():
    advantage = prepared(advantage={"eps": 0.0}).advantage
    assert advantage[1, 0].item() == pytest.approx(0.5**0.5)


def test_the_gradient_is_that_of_the_on_policy_ratio():
    method, batch = load_method("alto"), prepared()
    log_prob = torch.tensor([[-0.5, -1.0, -2.0], [-1.5, 0, 0]], dtype=torch.float64)
    ours, theirs = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    method.loss(ours, batch).loss.backward()

    difference = batch.ref_log_prob - theirs
    k3 = difference.exp() - difference - 1
    ratio = (theirs - theirs.detach()).exp()
    terms = -(batch.advantage * ratio - 0.001 * k3)
    (terms[batch.mask].mean()).clamp(max=1.0).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_one_update_per_rollout_is_required():
    assert {"on_policy", "groups", "ref_log_prob"} <= load_method("alto").needs
