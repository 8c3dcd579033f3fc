"""Batches are a pure function of the step, cover the data evenly and never repeat a prompt."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgrpo.data import PromptSource
from mmgrpo.errors import DataError
from mmgrpo.protocols import Prompt


def source(length, seed=0, **options):
    return PromptSource([Prompt(i, str(i)) for i in range(length)], seed=seed, **options)


def indices(prompts):
    return [prompt.index for prompt in prompts]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_batch_holds_different_prompts_and_ranks_cut_it(data):
    length = data.draw(st.integers(1, 40))
    size = data.draw(st.integers(1, length))
    world = data.draw(st.integers(1, 5))
    step = data.draw(st.integers(0, 200))
    prompts = source(length, seed=3, shuffle=data.draw(st.booleans()))
    whole = indices(prompts.batch(step, size))
    assert len(set(whole)) == size
    parts = [indices(prompts.batch(step, size, rank, world)) for rank in range(world)]
    assert [index for part in parts for index in part] == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_step_does_not_depend_on_what_was_asked_before():
    first, second = source(20, seed=5), source(20, seed=5)
    forward = [indices(first.batch(step, 6)) for step in range(12)]
    backward = [indices(second.batch(step, 6)) for step in reversed(range(12))]
    assert forward == backward[::-1]


def test_an_epoch_sees_every_prompt_once():
    prompts = source(24, seed=1)
    for epoch in range(3):
        seen = [i for b in range(4) for i in indices(prompts.batch(epoch * 4 + b, 6))]
        assert sorted(seen) == list(range(24))


def test_the_remainder_left_out_changes_from_epoch_to_epoch():
    prompts = source(10, seed=1)
    count = Counter(i for step in range(3000) for i in indices(prompts.batch(step, 4)))
    # 1500 epochs, each prompt in 8 of 10 places: binomial, standard deviation 15.5
    assert all(abs(n - 1200) < 5 * 15.5 for n in count.values())
    assert len(count) == 10


def test_seeds_and_epochs_give_other_orders():
    orders = {
        tuple(indices(source(30, seed=seed).batch(epoch, 30)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_unshuffled_goes_round_in_order():
    prompts = source(5, shuffle=False)
    assert [indices(prompts.batch(step, 2)) for step in range(4)] == [
        [0, 1],
        [2, 3],
        [4, 0],
        [1, 2],
    ]


def test_all_is_the_order_of_the_file():
    assert indices(source(5).all()) == [0, 1, 2, 3, 4]
    assert indices(source(5).all(2)) == [0, 1]


@pytest.mark.parametrize("size", [0, 6])
def test_more_prompts_than_there_are(size):
    with pytest.raises(DataError, match="the data has 5"):
        source(5).batch(0, size)


def test_no_prompts():
    with pytest.raises(DataError):
        PromptSource([], seed=0)
