"""Clip rules against the min-max form in which the papers write them."""

import itertools

import pytest
import torch

from mmgrpo.core.trust_regions import bounded, ppo_clip, unclipped

RATIOS = [0.05, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 1.5, 2.9, 3.1, 3.9, 4.1, 50.0]
ADVANTAGES = [-2.0, -0.3, 0.0, 0.3, 2.0]
GRID = torch.tensor(list(itertools.product(RATIOS, ADVANTAGES)), dtype=torch.float64)


def gained(rule, ratio, advantage):
    """The surrogate's value and its gradient in the ratio."""
    ratio = ratio.clone().requires_grad_()
    region = rule(ratio, advantage)
    value = region.ratio * advantage
    (gradient,) = torch.autograd.grad(value.sum(), ratio)
    return value.detach(), gradient, region.kept


def paper(ratio, advantage, low, high, dual=None, delta=None):
    """min(rho A, clip(rho) A), with rho capped first (two-sided) or the result floored (dual)."""
    value = torch.minimum(
        (ratio if delta is None else ratio.clamp(max=delta)) * advantage,
        ratio.clamp(1 - low, 1 + high) * advantage,
    )
    if dual is None:
        return value
    return torch.where(advantage < 0, torch.maximum(value, dual * advantage), value)


@pytest.mark.parametrize(
    "options",
    [
        {"low": 0.2, "high": 0.2},
        {"low": 0.2, "high": 0.28},
        {"low": 0.2, "high": 0.2, "dual": 3.0},
        {"low": 0.2, "high": 0.28, "dual": 10.0},
        {"low": 0.2, "high": 0.2, "delta": 4.0},
        {"low": 10.0, "high": 10.0},
        {"low": 3e-4, "high": 4e-4},
    ],
)
def test_value_and_gradient_are_those_of_the_min_form(options):
    ratio, advantage = GRID.T
    value, gradient, kept = gained(lambda r, a: ppo_clip(r, a, **options), ratio, advantage)
    torch.testing.assert_close(value, paper(ratio, advantage, **options))
    step = 1e-6
    slope = (
        paper(ratio + step, advantage, **options) - paper(ratio - step, advantage, **options)
    ) / (2 * step)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-6)
    off_zero = advantage != 0
    assert torch.equal(kept[off_zero], (slope.abs() > 1e-9)[off_zero])


def test_numbers_of_the_grpo_card():
    value, gradient, kept = gained(ppo_clip, torch.tensor([1.5, 1.5]), torch.tensor([1.0, -1.0]))
    assert value.tolist() == pytest.approx([1.2, -1.5])
    assert gradient.tolist() == [0, -1]
    assert kept.tolist() == [False, True]


def test_numbers_of_the_gspo_card():
    value, gradient, _ = gained(
        lambda r, a: ppo_clip(r, a, low=3e-4, high=4e-4), torch.tensor([1.1814]), torch.ones(1)
    )
    assert value.item() == pytest.approx(1.0004)
    assert gradient.item() == 0


def test_dual_clip_caps_the_loss_of_negative_advantages():
    value, gradient, _ = gained(
        lambda r, a: ppo_clip(r, a, dual=3.0), torch.tensor([5.0]), torch.tensor([-2.0])
    )
    assert value.item() == -6.0
    assert gradient.item() == 0


def test_equal_widths_of_clip_higher_are_the_plain_clip():
    ratio, advantage = GRID.T
    for one, other in zip(
        ppo_clip(ratio, advantage, low=0.2, high=0.2), ppo_clip(ratio, advantage), strict=True
    ):
        assert torch.equal(one, other)


def test_without_a_region_everything_is_kept():
    ratio, advantage = GRID.T
    value, gradient, kept = gained(unclipped, ratio, advantage)
    torch.testing.assert_close(value, ratio * advantage)
    torch.testing.assert_close(gradient, advantage)
    assert kept.all()


def test_on_policy_nothing_is_cut():
    advantage = torch.tensor([-1.0, 0.0, 1.0])
    for options in ({}, {"low": 0.0, "high": 0.0}, {"dual": 3.0}, {"delta": 4.0}):
        assert ppo_clip(torch.ones(3), advantage, **options).kept.all()


def test_bounds_are_constants():
    upper = torch.full((1,), 2.0, requires_grad=True)
    region = bounded(torch.full((1,), 5.0), torch.zeros(1), upper)
    assert region.ratio.item() == 2
    assert not region.ratio.requires_grad


@pytest.mark.parametrize(
    "options", [{"low": -0.1}, {"high": -0.1}, {"dual": 1.1}, {"delta": 1.2}, {"delta": 0.5}]
)
def test_contradictory_bounds_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        ppo_clip(torch.ones(1), torch.ones(1), **options)
