"""Step selection and seeding: counts, places, independence of the batch, seeds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mmgrpo.core.diffusion import SELECTORS, select_steps
from mmgrpo.core.seeding import generator, mix_seed


def choose(kind: str, count: int = 10, seed: int = 0, rows: int = 3, **options):
    seeds = [mix_seed(seed, row) for row in range(rows)]
    return select_steps({"kind": kind, **options}, count, seed=seed, sample_seeds=seeds)


def places(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def test_all_but_last():
    chosen = choose("all_but_last", count=5)
    assert places(chosen.stochastic) == [0, 1, 2, 3]
    assert torch.equal(chosen.trained, chosen.stochastic.expand(3, 5))


def test_random_fraction_trains_the_stated_number_per_sample():
    chosen = choose("random_fraction", count=16, rows=50, fraction=0.6)
    assert places(chosen.stochastic) == list(range(15))
    assert chosen.trained.sum(1).unique().tolist() == [9]  # floor(0.6 x 15)
    assert len({tuple(places(row)) for row in chosen.trained}) > 40
    assert choose("random_fraction", count=101, fraction=0.29).trained.sum(1)[0] == 29


def test_random_fraction_is_uniform_over_the_steps():
    chosen = choose("random_fraction", count=5, rows=4000, fraction=0.5)
    frequency = chosen.trained.double().mean(0)
    assert frequency[4] == 0
    assert ((frequency[:4] - 0.5).abs() < 4 * 0.5 / 4000**0.5).all()


def test_single_and_window_at_a_given_place():
    assert places(choose("single", step=3).stochastic) == [3]
    assert places(choose("window", start=2, width=4).stochastic) == [2, 3, 4, 5]
    assert places(choose("window", start=7, width=4).stochastic) == [7, 8]  # step 9 is the last


def test_random_window_is_shared_and_covers_its_range():
    starts = Counter()
    for seed in range(300):
        chosen = choose("window", seed=seed, width=3, first=1, last=6)
        inside = places(chosen.stochastic)
        assert len(inside) == 3
        assert (chosen.trained == chosen.stochastic).all()
        starts[inside[0]] += 1
    assert sorted(starts) == [1, 2, 3]
    singles = {places(choose("single", seed=seed).stochastic)[0] for seed in range(300)}
    assert singles == set(range(9))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "all_but_last"},
        {"kind": "random_fraction", "fraction": 0.5},
        {"kind": "single"},
        {"kind": "window", "width": 3},
    ],
)
def test_a_sample_is_treated_the_same_in_any_batch(options):
    assert options["kind"] in SELECTORS
    seeds = [mix_seed(7, row) for row in range(6)]
    whole = select_steps(options, 9, seed=7, sample_seeds=seeds)
    part = select_steps(options, 9, seed=7, sample_seeds=seeds[4:])
    assert torch.equal(whole.stochastic, part.stochastic)
    assert torch.equal(whole.trained[4:], part.trained)
    assert (whole.trained <= whole.stochastic).all()
    assert not whole.stochastic[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "al"}, "unknown selection 'al'"),
        ({"kind": "window"}, "missing a required argument: 'width'"),
        (
            {"kind": "single", "place": 3},
            r"unexpected keyword argument 'place'; its options: \['step'\]",
        ),
        ({"kind": "single", "step": 9}, "must start in"),
        ({"kind": "random_fraction", "fraction": 0.05}, "leaves no step"),
        ({"kind": "random_fraction", "fraction": 1.5}, "must be in"),
        ({"kind": "window", "width": 2, "last": 10}, "last <= 9"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        select_steps(options, 10, seed=0, sample_seeds=[1])


def test_one_step_cannot_be_stochastic():
    with pytest.raises(ValueError, match="at least 2 steps"):
        choose("all_but_last", count=1)


def test_mixed_seeds_differ_by_value_order_and_length():
    names = [(a, b, c) for a in range(-5, 15) for b in range(20) for c in range(20)]
    assert len({mix_seed(*name) for name in names}) == len(names)
    assert len({mix_seed(1, 2), mix_seed(2, 1), mix_seed(1, 2, 0), mix_seed(1)}) == 4
    assert all(0 <= mix_seed(*name) < 2**63 for name in names)


def test_mixed_seeds_are_the_same_on_every_platform():
    """A changed value would change every published run."""
    assert mix_seed(1, 2) == 8051174431233965979
    assert mix_seed(0) == 313702574736366215
    with pytest.raises(ValueError, match="at least one"):
        mix_seed()


def test_neighbouring_streams_are_uncorrelated():
    a, b = (torch.randn(20_000, generator=generator(5, index)) for index in (0, 1))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 4 / 20_000**0.5
