"""Noise levels and surrogate log-probabilities of draws on clean samples."""

import math

import pytest
import torch

from mmgrpo.core.diffusion import MatchingRule, linear_shift
from mmgrpo.core.seeding import generator

SCHEDULE = linear_shift(10, shift=3.0)


def log_prob(error, sigma, **options):
    """The log-probability where every element's error is sqrt(error)."""
    velocity, target = torch.full((1, 2, 3), math.sqrt(error)).double(), torch.zeros(1, 2, 3)
    rule = MatchingRule(draws=1, **options)
    return rule.log_prob(velocity, target, torch.tensor([sigma]).double()).item()


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({"weight": "uniform"}, 1.010050),
        ({"weight": "generalised_huber", "power": 0.25}, 1.013649),
        ({"weight": "sigma"}, math.exp(0.8 * 0.01)),
        ({"weight": "sigma_squared"}, math.exp(0.64 * 0.01)),
        ({"weight": "huber"}, math.exp(0.8 * (0.5**0.5 - 0.49**0.5))),
    ],
)
def test_the_ratios_of_the_awm_card(options, ratio):
    found = math.exp(log_prob(0.49, 0.8, **options) - log_prob(0.50, 0.8, **options))
    assert found == pytest.approx(ratio, abs=5e-7)


@pytest.mark.parametrize("weight", ["uniform", "sigma_squared", "huber", "generalised_huber"])
def test_no_error_is_log_probability_zero_with_a_finite_slope(weight):
    velocity = torch.zeros(3, 4, requires_grad=True)
    rule = MatchingRule(draws=1, weight=weight)
    found = rule.log_prob(velocity, torch.zeros(3, 4), torch.tensor([0.0, 0.5, 1.0]))
    found.sum().backward()
    assert found.tolist() == [0, 0, 0]
    assert velocity.grad.isfinite().all()


def test_half_precision_is_compared_in_float32():
    velocity = torch.full((1, 4), 100.0, dtype=torch.float16)
    found = MatchingRule(draws=1).log_prob(velocity, -2 * velocity, torch.ones(1))
    assert found.dtype == torch.float32
    assert found.item() == -90000  # beyond float16


def test_strata_hold_one_level_each_and_are_shifted():
    rule = MatchingRule(draws=6, times="stratified", shift=3.0)
    firsts = set()
    for seed in range(20):
        sigma = rule.sigmas(SCHEDULE, generator(seed))
        share = (sigma / (3 - 2 * sigma)).double()  # inverse of the shift
        assert (share * 6).sort().values.floor().tolist() == list(range(6))
        firsts.add(int(share[0] * 6))
    assert len(firsts) > 3  # no draw belongs to a stratum


def test_uniform_levels_have_the_mean_of_the_shifted_uniform():
    rule = MatchingRule(draws=20000, times="uniform", shift=3.0)
    mean = 3 * (1 / 2 - math.log(3) / 4)  # integral of 3 u / (1 + 2 u)
    assert rule.sigmas(SCHEDULE, generator(1)).mean().item() == pytest.approx(mean, abs=0.01)


def test_scheduled_levels_are_different_ones_of_the_rollout():
    rule = MatchingRule(draws=0.99, times="schedule")
    assert rule.count(10) == 9
    seen = set()
    for seed in range(30):
        sigma = rule.sigmas(SCHEDULE, generator(seed))
        assert len(set(sigma.tolist())) == 9
        assert set(sigma.tolist()) < set(SCHEDULE[:-1].tolist())
        seen |= set(sigma.tolist())
    assert seen == set(SCHEDULE[:-1].tolist())


def test_a_share_rounds_down_and_keeps_one():
    assert [MatchingRule(draws=share).count(10) for share in (0.6, 0.39, 0.01)] == [6, 3, 1]
    assert MatchingRule(draws=6).count(4) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": -1}, "at least 0"),
        ({"draws": 1.5}, "share up to 1.0"),
        ({"times": "log"}, "stratified, uniform, schedule"),
        ({"weight": "t"}, "generalised_huber"),
        ({"shift": 0.0}, "positive"),
        ({"times": "schedule", "shift": 3.0}, "shifted as it is"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MatchingRule(**{"draws": 2, **options})


def test_more_levels_than_the_rollout_has_are_refused():
    with pytest.raises(ValueError, match="does not have 5"):
        MatchingRule(draws=5, times="schedule").count(4)
