"""Presets by name on a few decisions, with numbers worked out by hand or printed in a paper."""

import math

import pytest
import torch
from method_batches import load_method

from mmgrpo.core import Trajectories
from mmgrpo.protocols import Evaluation


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def group_of(rewards, *, width=1, **fields):
    """One group of samples of ``width`` decisions."""
    shape = len(rewards), width
    return Trajectories(
        group=torch.zeros(len(rewards), dtype=torch.int64),
        mask=torch.ones(shape, dtype=torch.bool),
        rewards={"score": tensor(rewards)},
        **{"old_log_prob": torch.zeros(shape, dtype=torch.float64), **fields},
    )


def learn(name, trajectories, log_prob, **evaluation):
    """Prepared trajectories, the loss, and its gradient in the log-probabilities."""
    method = load_method(name)
    prepared = method.prepare(trajectories)
    log_prob = tensor(log_prob).requires_grad_()
    found = Evaluation(log_prob=log_prob, **evaluation)
    output = method.loss(log_prob, prepared, evaluation=found)
    (gradient,) = torch.autograd.grad(output.loss, log_prob)
    return prepared, output.loss.item(), gradient.tolist()


def near(expected, **options):
    return pytest.approx(expected, **{"abs": 1e-6, **options})


def test_vrpo_llada():
    """B_w -10 (reference -10.5), B_l -12 (-11.8), beta .2: .6256, and .05 |B_w| / 4 tokens."""
    views = [tensor([[-9.0, -11.0], [-14.0, -10.0]]), tensor([[-10.0, -11.0], [-11.8, -11.8]])]
    batch = group_of([1.0, 0.0], width=2, ref_log_prob=views[1], tokens=tensor([4.0, 7.0]))
    _, loss, gradient = learn("vrpo-llada", batch, views[0].tolist())
    assert loss == near(0.6256 + 0.05 * 10 / 4, abs=5e-5)
    share = 0.2 / (1 + math.exp(0.14)) / 2  # of each of the two views
    assert gradient[0] == near([-share - 0.05 / 4 / 2] * 2)
    assert gradient[1] == near([share] * 2)


def test_sepo():
    """The clip bounds the weight of a token and, unlike PPO's, never stops its gradient."""
    batch = group_of([1.0, 0.0])
    _, _, gradient = learn("sepo", batch, [[math.log(1.5)]] * 2)
    score = 1 / math.sqrt(2)
    assert gradient == [[near(-1.2 * score / 2)], [near(1.5 * score / 2)]]
    _, _, gradient = learn("sepo", batch, [[math.log(0.5)]] * 2)
    assert gradient == [[near(-0.5 * score / 2)], [near(0.8 * score / 2)]]


def test_maxrl():
    """One of four is right: three times the push of a success where half are."""
    prepared, _, gradient = learn("maxrl", group_of([1.0, 0, 0, 0]), [[0.0]] * 4)
    assert prepared.advantage.flatten().tolist() == near([3, -1, -1, -1], abs=2e-5)
    assert gradient == [[near(-3 / 4, abs=1e-5)]] + [[near(1 / 4, abs=1e-5)]] * 3
    half, _, _ = learn("maxrl", group_of([1.0, 1.0, 0, 0]), [[0.0]] * 4)
    assert half.advantage.flatten().tolist() == near([1, 1, -1, -1], abs=5e-6)


def test_unirl():
    """Answers right on 2, 3 and 1 of 3 questions; every picture counts the same, long or short."""
    batch = group_of([2 / 3, 1.0, 1 / 3], width=2)
    batch = batch.replace(mask=torch.tensor([[True, True], [True, True], [True, False]]))
    prepared, _, gradient = learn("unirl", batch, [[0.0, 0.0]] * 3)
    assert prepared.advantage.tolist() == [[0, 0], near([1, 1], abs=1e-5), near([-1, 0], abs=1e-5)]
    assert gradient == [[0, 0], near([-1 / 6] * 2, abs=1e-5), near([1 / 3, 0], abs=1e-5)]


def test_reasongen_r1():
    """A controlled entropy enters with its own weight, undivided, beside the mean over tokens."""
    weight = tensor([[0.3], [-0.2]])
    entropy = tensor([[2.0], [5.0]])
    batch = group_of([1.0, 0.0], entropy_weight=weight)
    _, loss, gradient = learn("reasongen-r1", batch, [[0.0]] * 2, entropy=entropy)
    assert loss == near(0.3 * 2 - 0.2 * 5)  # the surrogate of opposite advantages is 0
    assert gradient == [[near(-(0.5**0.5) / 2)], [near(0.5**0.5 / 2)]]


def test_dgpo():
    """A group counts half at the reference, and less as the policy learns its order."""
    score = 0.5**0.5
    ref = tensor([[-0.50], [-0.60]])
    batch = group_of([1.0, 0.0], ref_log_prob=ref, old_log_prob=ref)
    _, _, gradient = learn("dgpo", batch, ref.tolist())
    assert gradient == [[near(-0.5 * score / 2)], [near(0.5 * score / 2)]]
    moved = tensor([[-0.49], [-0.62]])
    _, _, gradient = learn("dgpo", batch.replace(old_log_prob=moved), moved.tolist())
    weight = 1 / (1 + math.exp(1.5 * score))
    assert gradient == [[near(-weight * score / 2)], [near(weight * score / 2)]]
