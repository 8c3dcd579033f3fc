"""SEPO's loss: worked numbers, the exact gradient on four states, and what is left of it."""

import pytest
import torch

from mmgrpo.core.objectives import Decisions
from mmgrpo.core.score_entropy import bounded_weight, neighbour_losses, score_entropy


def test_the_worked_weight():
    """pi .3, pi_old .25, s_old .5, s .6, A 1: r = 1 and w = .3."""
    log_score = torch.tensor([0.6]).log().requires_grad_()
    old, pi, old_pi = (torch.tensor([value]).log() for value in (0.5, 0.3, 0.25))
    loss = neighbour_losses(log_score, old, pi, old_pi, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(loss, log_score)
    assert float(gradient) == pytest.approx(0.3)


def test_a_good_sample_lowers_its_neighbours_scores():
    log_score = torch.zeros(3, requires_grad=True)
    pi = torch.full((3,), 0.2).log()
    loss = neighbour_losses(log_score, torch.zeros(3), pi, pi, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(loss, log_score)
    assert bool((gradient > 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_gradient_of_the_expected_advantage(seed):
    """Four states, all others as neighbours, x drawn from pi: minus the gradient of E A."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    advantage = torch.randn(4, generator=generator, dtype=torch.float64)
    log_pi = theta.log_softmax(dim=0)
    losses = []
    for x in range(4):
        others = [y for y in range(4) if y != x]
        score = log_pi[others] - log_pi[x]
        frozen, pi = score.detach(), log_pi.detach()[others]
        losses.append(neighbour_losses(score, frozen, pi, pi, advantage[x]))
    expected = (log_pi.detach().exp() * torch.stack(losses)).sum()
    (found,) = torch.autograd.grad(expected, theta, retain_graph=True)
    (wanted,) = torch.autograd.grad(-(log_pi.exp() * advantage).sum(), theta)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("advantage", [0.7, -1.3])
@pytest.mark.parametrize("shift", [0.0, 0.05, -0.9, 1.1])
def test_of_all_neighbours_at_one_place_the_token_s_own_term_is_left(advantage, shift):
    """The general loss over a categorical's other values has the gradient of the short one."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64)
    old = (logits + torch.tensor([shift, 0, 0, 0])).log_softmax(dim=0)
    logits.requires_grad_()
    log_p, a = logits.log_softmax(dim=0), torch.tensor(advantage, dtype=torch.float64)
    score, old_score = log_p[1:] - log_p[0], old[1:] - old[0]
    general = neighbour_losses(score, old_score, log_p[1:].detach(), old[1:], a)
    (wanted,) = torch.autograd.grad(general, logits, retain_graph=True)
    moved = (log_p[0] - old[0]).reshape(1, 1)
    short = score_entropy(Decisions(moved, log_p[0].reshape(1, 1), old[:1, None], a.reshape(1, 1)))
    (found,) = torch.autograd.grad(short.loss.sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_a_bound_limits_the_weight_and_never_stops_the_gradient():
    ratio = torch.tensor([0.1, 1.0, 5.0])
    assert bounded_weight(ratio, torch.ones(3), low=0.2, high=0.2).tolist() == pytest.approx(
        [0.1, 1.0, 1.2]
    )
    assert bounded_weight(ratio, -torch.ones(3), low=0.2, high=0.2).tolist() == pytest.approx(
        [-0.8, -1.0, -5.0]
    )
    log_prob = torch.zeros(1, 1, requires_grad=True)
    moved = torch.full((1, 1), 3.0)
    found = score_entropy(Decisions(moved, log_prob, log_prob.detach(), torch.ones(1, 1)))
    assert not found.kept.any()
    found.loss.sum().backward()
    assert float(log_prob.grad) == pytest.approx(-1.2)
    with pytest.raises(ValueError, match="clip widths"):
        bounded_weight(ratio, ratio, low=1.5, high=0.2)
