"""Surrogates: the cards' worked numbers, and gradients that tell the methods apart."""

import math

import pytest
import torch

from mmgrpo.core.objectives import (
    Decisions,
    log_policy_gradient,
    policy_gradient,
    reinforce,
    weighted_policy_gradient,
)
from mmgrpo.core.trust_regions import ppo_clip, unclipped


def surrogate(objective, log_prob, old, advantage, **options):
    """Loss, gradient in log_prob and kept, for lists of numbers."""
    log_prob, old, advantage = (
        torch.tensor(x, dtype=torch.float64) for x in (log_prob, old, advantage)
    )
    log_prob.requires_grad_()
    found = objective(Decisions(log_prob - old, log_prob, old, advantage), **options)
    (gradient,) = torch.autograd.grad(found.loss.sum(), log_prob)
    return found.loss.tolist(), gradient.tolist(), found.kept.tolist()


def test_numbers_of_the_cpgd_card():
    loss, gradient, kept = surrogate(
        log_policy_gradient, [-1.0, -1.5, -1.2], [-1.5, -1.0, -1.25], [1, -1, 1]
    )
    assert loss == pytest.approx([1.3177, -1.2231, 1.2], abs=5e-5)
    assert gradient == [0, 0, -1]
    assert kept == [False, False, True]


def test_the_log_space_clip_is_the_papers_min_form_up_to_a_constant():
    """Phi = min(A log rho, A clip(log rho)); the loss is A old - Phi."""
    low, high = 0.2, 0.3
    for log_rho in (-0.5, -0.2, -0.1, 0.0, 0.1, 0.25, 0.27, 0.6):
        for a in (-2.0, -0.5, 0.5, 2.0):
            old = -1.7
            loss, gradient, _ = surrogate(
                log_policy_gradient, [old + log_rho], [old], [a], low=low, high=high
            )
            clipped = max(min(log_rho, math.log(1 + high)), math.log(1 - low))
            phi = min(a * log_rho, a * clipped)
            assert loss[0] == pytest.approx(-phi - a * old)
            inside = phi == pytest.approx(a * log_rho)
            assert gradient[0] == pytest.approx(-a if inside else 0)


def test_numbers_of_the_cispo_card():
    loss, gradient, kept = surrogate(
        weighted_policy_gradient, [-1.0], [-1.0 - math.log(7)], [1.0], max_weight=5.0
    )
    assert loss == pytest.approx([5.0])
    assert gradient == pytest.approx([-5.0])
    assert kept == [False]


def test_cispo_inside_its_cap_has_the_unclipped_gradient_rho_a():
    log_prob, old, advantage = [-1.0, -0.3, -2.0], [-1.4, -0.1, -2.0], [1.0, -2.0, 0.5]
    _, weighted, kept = surrogate(weighted_policy_gradient, log_prob, old, advantage)
    _, unbounded, _ = surrogate(policy_gradient, log_prob, old, advantage, trust_region=unclipped)
    assert all(kept)
    assert weighted == pytest.approx(unbounded)
    rho_a = [-math.exp(n - o) * a for n, o, a in zip(log_prob, old, advantage, strict=True)]
    assert weighted == pytest.approx(rho_a)


def test_a_lower_bound_of_the_weight():
    _, gradient, kept = surrogate(
        weighted_policy_gradient, [-3.0], [-1.0], [1.0], min_weight=0.5, max_weight=2.0
    )
    assert gradient == [-0.5]
    assert kept == [False]


def test_on_policy_every_objective_has_the_gradient_of_reinforce():
    log_prob, advantage = [-1.0, -0.3, -2.0], [1.0, -2.0, 0.5]
    minus_a = [-a for a in advantage]
    for objective, options in (
        (policy_gradient, {"trust_region": ppo_clip}),
        (reinforce, {}),
        (log_policy_gradient, {}),
        (weighted_policy_gradient, {}),
    ):
        _, gradient, kept = surrogate(objective, log_prob, log_prob, advantage, **options)
        assert gradient == pytest.approx(minus_a)
        assert all(kept)


def test_reinforce_is_minus_a_log_prob_and_ignores_the_old_policy():
    loss, gradient, kept = surrogate(reinforce, [-1.0, -2.0], [-9.0, 0.0], [2.0, -1.0])
    assert loss == [2.0, -2.0]
    assert gradient == [-2.0, 1.0]
    assert all(kept)


def test_clipped_decisions_pass_no_gradient():
    _, gradient, kept = surrogate(
        policy_gradient, [0.0, -2.0], [-1.0, -1.0], [1.0, -1.0], trust_region=ppo_clip
    )
    assert gradient == [0, 0]
    assert kept == [False, False]


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (log_policy_gradient, {"low": 1.0}),
        (log_policy_gradient, {"low": -0.1}),
        (log_policy_gradient, {"high": -0.1}),
        (weighted_policy_gradient, {"min_weight": 2.0, "max_weight": 1.0}),
        (weighted_policy_gradient, {"min_weight": -1.0}),
    ],
)
def test_contradictory_bounds_are_refused(objective, options):
    with pytest.raises(ValueError, match="<="):
        surrogate(objective, [0.0], [0.0], [1.0], **options)
