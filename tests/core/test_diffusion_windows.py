"""Moving windows and the suffix's points against the published programs' numbers."""

from __future__ import annotations

import math

import pytest
import torch

from mmgrpo.core.diffusion import (
    Pace,
    Suffix,
    dpmpp_2m,
    linear_shift,
    respace,
    sd3_shift,
    select_steps,
    window_start,
)
from mmgrpo.core.diffusion.windows import decay, exponential


def steps_at(iteration: int, count: int, **options) -> list[int]:
    chosen = select_steps(
        {"kind": "moving_window", **options}, count,
        seed=iteration, sample_seeds=[iteration, 7], iteration=iteration,
    )  # fmt: skip
    assert torch.equal(chosen.trained, chosen.stochastic.expand(2, count))
    return chosen.stochastic.nonzero().flatten().tolist()


def public_window(iteration: int, count: int, width: int, interval: int) -> list[int]:
    """The public program, step by step: move after ``interval`` iterations, start over behind M."""
    place, stayed, end = 0, 0, count - 2
    for _ in range(iteration):
        stayed += 1
        if stayed == interval:
            place, stayed = place + 1, 0
            if place > end:
                place = 0
    return list(range(place, min(place + width, end)))


def test_the_windows_are_the_published_ones_and_never_empty():
    rounds = [steps_at(2 * move, 10, width=4, interval=2) for move in range(10)]
    assert rounds == [
        [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7],
        [5, 6, 7], [6, 7], [7], [7], [0, 1, 2, 3],
    ]  # fmt: skip
    for iteration in range(60):
        found = steps_at(iteration, 10, width=4, interval=3)
        wanted = public_window(iteration, 10, 4, 3)
        assert found == (wanted or [7])
    assert steps_at(299, 25, width=4, interval=25) == [11, 12, 13, 14]


def test_the_published_intervals():
    paces = Pace(end=23, interval=25)
    assert [exponential(place, paces) for place in range(12, 24)] == [
        25, 25, 23, 21, 19, 17, 16, 14, 13, 12, 11, 10,
    ]  # fmt: skip
    ten = Pace(end=23, interval=10)
    assert [decay(place, ten) for place in (0, 4, 8, 12, 16, 20)] == [10, 8, 6, 5, 3, 2]
    assert decay(23, ten) == 1


@pytest.mark.parametrize("pace", ["decay", "exponential"])
def test_a_pace_stays_as_long_as_it_says(pace):
    times = Pace(end=23, interval=10)
    starts = [window_start(i, times, pace=pace) for i in range(500)]
    stay = {"decay": decay, "exponential": exponential}[pace]
    wanted = [min(place, 22) for place in range(24) for _ in range(stay(place, times))]
    wanted = (wanted * math.ceil(500 / len(wanted)))[:500]
    assert starts == wanted


def test_a_stride_skips_places():
    starts = [window_start(i, Pace(end=8, interval=1), stride=3) for i in range(6)]
    assert starts == [0, 3, 6, 0, 3, 6]


def test_a_window_over_all_steps_is_all_but_last():
    for iteration in (0, 24):
        assert steps_at(iteration, 10, width=9, last=9, interval=25) == list(range(9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width >= 1"),
        ({"width": 2, "last": 10}, "last <= 9"),
        ({"width": 2, "pace": "decays"}, "unknown pace 'decays'"),
        ({"width": 2, "stride": 0}, "stride >= 1"),
        ({"width": 2, "interval": 0}, "interval >= 1"),
    ],
)
def test_wrong_windows_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        steps_at(0, 10, **options)


def test_two_steps_leave_the_published_window_no_place():
    with pytest.raises(ValueError, match="last 0"):
        steps_at(0, 2, width=1)


# -- suffix ---------------------------------------------------------------------------------------


def flash_steps(start: int, fraction: float, count: int = 25) -> int:
    """Steps of the whole rollout whose window of 4 starts at ``start``."""
    last = min(start + 4, count - 2) - 1
    points = Suffix("dpmpp_2m", fraction).sigmas(linear_shift(count, shift=3.0), last + 1)
    return last + 1 + len(points) - 1


def test_the_published_step_counts():
    assert [flash_steps(start, 0.4) for start in (0, 5, 10)] == [11, 14, 17]
    assert flash_steps(0, 0.2) == 7  # Flash*
    # The published mean over the starts 0..19 is 17.1; two of them stop short of 0 there.
    assert sum(flash_steps(start, 0.4) for start in range(20)) == 342 + 2


def test_the_points_are_the_published_ones():
    schedule = linear_shift(25, shift=3.0)
    uniform = torch.linspace(1 - 4 / 25, 0, 8, dtype=torch.float64)
    wanted = 3 * uniform / (1 + 2 * uniform)
    found = Suffix("dpmpp_2m", 0.4).sigmas(schedule, 4)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    alone = Suffix("dpmpp_2m", 0.4).sigmas(schedule, 23)  # the published single point
    assert alone.tolist() == [schedule[23], 0]


@pytest.mark.parametrize("make", [linear_shift, sd3_shift])
def test_all_points_are_the_schedules_own_and_fewer_fall_to_zero(make):
    schedule = make(12)
    assert torch.equal(Suffix().sigmas(schedule, 5), schedule[5:])
    assert torch.equal(respace(schedule, torch.arange(1.0, 13.0).double()), schedule[1:])
    for fraction in (0.2, 0.5, 0.8):
        points = Suffix("dpmpp_2m", fraction).sigmas(schedule, 5)
        assert points[0] == schedule[5]
        assert points[-1] == 0
        assert (points.diff() < 0).all()


def test_the_solvers_are_the_ode_and_dpmpp():
    x, v = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    sigma, after = torch.tensor(0.8).double(), torch.tensor(0.7).double()
    previous = (torch.randn(2, 3).double(), torch.tensor(0.9).double())
    euler = Suffix().step(v, x, sigma, after, previous)
    torch.testing.assert_close(euler, x + v * (after - sigma))
    second = Suffix("dpmpp_2m").step(v, x, sigma, after, previous)
    torch.testing.assert_close(second, dpmpp_2m(x - 0.8 * v, x, 0.8, 0.7, previous=previous))
    # by hand: x0hat .70 at sigma .9, then .74 at .8
    x, x0 = torch.tensor([[0.5]]).double(), 0.74
    found = Suffix("dpmpp_2m").step(
        (x - x0) / 0.8, x, sigma, after, (torch.tensor([[0.7]]).double(), previous[1])
    )
    assert found.item() == pytest.approx(0.531662, abs=1e-6)


def test_wrong_suffixes_are_named():
    with pytest.raises(ValueError, match="unknown solver 'heun'"):
        Suffix("heun")
    with pytest.raises(ValueError, match="fraction"):
        Suffix(fraction=0.0)
