"""Rewards called on groups while others are made: the same scores, and the same failures."""

import asyncio
import logging
import math
import threading

import pytest
import torch
from PIL import Image

from mmgrpo.errors import RewardError
from mmgrpo.protocols import Prompt, Sample
from mmgrpo.scoring import RewardRunner, load_rewards

GROUPS, SIZE = 3, 4
PROMPTS = [Prompt(index, f"p{index}", (), {"answer": index}) for index in range(GROUPS)]
SAMPLES = [
    Sample(prompt, f"{prompt.content}s{member}") for prompt in PROMPTS for member in range(SIZE)
]
ORDERS = [(0, 1, 2), (2, 0, 1)]


def group(index):
    return SAMPLES[index * SIZE : (index + 1) * SIZE]


def number(completion):
    """The row of a completion in the canonical order."""
    prompt, _, member = completion[1:].partition("s")
    return int(prompt) * SIZE + int(member)


def rows(completions):
    return [float(number(completion)) for completion in completions]


async def rows_later(completions):
    await asyncio.sleep(0)
    return rows(completions)


def compared(completions, prompts):
    """The share of the group that a sample exceeds; wrong unless it sees the whole group."""
    return [
        sum(other < one for other, place in zip(completions, prompts, strict=True) if place == its)
        / prompts.count(its)
        for one, its in zip(completions, prompts, strict=True)
    ]


def runner_of(*functions, **options):
    return RewardRunner(load_rewards(list(functions)), **options)


def score_ahead(runner, order=(0, 1, 2), samples=SAMPLES):
    """Announce the groups in some order, then score all."""
    ahead = runner.ahead(PROMPTS)
    for index in order:
        ahead.add(group(index))
    return ahead.score(samples, step=3)


def watched(calls, fn=rows):
    def reward(completions):
        calls.append(([number(c) for c in completions], threading.current_thread()))
        return fn(completions)

    return reward


def raise_error():
    raise KeyError("no such key")


def bad_at(row, make):
    def reward(completions):
        return [make() if number(c) == row else 1.0 for c in completions]

    return reward


# -- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_scores_are_those_of_one_call_in_the_canonical_order(order):
    rewards = [rows, rows_later, compared]
    plain = runner_of(*rewards).score(SAMPLES, step=3)
    found = score_ahead(runner_of(*rewards), order)
    assert list(found.values) == list(plain.values) == ["rows", "rows_later", "compared"]
    assert list(found.seconds) == list(plain.seconds)
    for name, values in plain.values.items():
        assert torch.equal(found.values[name], values)
    assert found.values["rows"].tolist() == list(range(GROUPS * SIZE))
    assert found.values["compared"].tolist() == [0, 0.25, 0.5, 0.75] * GROUPS
    assert not found.dropped.any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_call_is_a_whole_group_in_the_order_of_the_announcements(order):
    calls = []
    score_ahead(runner_of(watched(calls)), order)
    assert [seen for seen, _ in calls] == [[number(s.completion) for s in group(i)] for i in order]
    (thread,) = {thread for _, thread in calls}
    assert thread is not threading.main_thread()


def test_none_stays_not_applicable():
    scores = score_ahead(runner_of(bad_at(5, lambda: None)))
    assert scores.values["reward"].isnan().nonzero().flatten().tolist() == [5]
    assert not scores.dropped.any()


def test_seconds_are_the_sum_of_the_calls():
    waiting = threading.Event()
    scores = score_ahead(runner_of(lambda completions: waiting.wait(0.05) or rows(completions)))
    (seconds,) = scores.seconds.values()
    assert seconds >= GROUPS * 0.05


# -- beside the rollout --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_group_is_scored_before_the_next_is_announced(kind):
    started = threading.Event()

    def plain(completions):
        started.set()
        return rows(completions)

    async def later(completions):
        return plain(completions)

    ahead = runner_of({"sync": plain, "async": later}[kind]).ahead(PROMPTS)
    for index in range(GROUPS):
        started.clear()
        ahead.add(group(index))
        assert started.wait(10)
    assert ahead.score(SAMPLES, step=0).values.popitem()[1].tolist() == list(range(GROUPS * SIZE))


def test_sync_rewards_do_not_overlap_each_other():
    inside = threading.Lock()

    def alone(name):
        def reward(completions):
            assert inside.acquire(blocking=False)
            threading.Event().wait(0.005)
            inside.release()
            return rows(completions)

        reward.__name__ = name
        return reward

    assert len(score_ahead(runner_of(alone("a"), alone("b"))).values) == 2


# -- who is not called early ---------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["keeps_time", "whole_batch"])
def test_marked_rewards_get_everything_in_the_calling_thread(mark):
    calls, early = [], []
    late = watched(calls)
    setattr(late, mark, True)
    scores = score_ahead(runner_of(late, watched(early)))
    assert calls == [(list(range(GROUPS * SIZE)), threading.main_thread())]
    assert len(early) == GROUPS
    assert all(values.tolist() == list(range(GROUPS * SIZE)) for values in scores.values.values())
    assert runner_of(late).ahead(PROMPTS) is None


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[:1],
        [Prompt(0, "p"), Prompt(1, "p")],
        [Prompt(0, "p"), Prompt(1, "q", (), {"answer": 1})],
        [Prompt(0, "p"), Prompt(1, "q", [Image.new("RGB", (2, 2))])],
    ],
    ids=["one", "equal contents", "other columns", "other images"],
)
def test_prompts_that_rewards_see_differently_among_others_wait(prompts):
    assert runner_of(rows).ahead(prompts) is None


@pytest.mark.parametrize("order", [(), (0, 2)])
def test_samples_that_were_not_announced_are_scored_at_the_end(order):
    scores = score_ahead(runner_of(rows, rows_later), order)
    assert all(values.tolist() == list(range(GROUPS * SIZE)) for values in scores.values.values())


def test_samples_that_were_replaced_are_scored_again():
    copies = [Sample(s.prompt, s.completion + "0") for s in SAMPLES]
    expected = runner_of(rows).score(copies, step=0).values["rows"]
    assert torch.equal(score_ahead(runner_of(rows), samples=copies).values["rows"], expected)


# -- failures ------------------------------------------------------------------------------------

BROKEN = {"raises": raise_error, "nan": lambda: math.nan, "text": lambda: "1"}


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("row", [0, 6, 11])
def test_a_failure_stops_the_run_with_the_same_message(make, row, tmp_path):
    def message(score, folder):
        runner = runner_of(bad_at(row, make), save_dir=tmp_path / folder)
        with pytest.raises(RewardError) as caught:
            score(runner)
        files = sorted(path.name for path in (tmp_path / folder).rglob("*"))
        return str(caught.value).replace(folder, ""), files

    plain = message(lambda runner: runner.score(SAMPLES, step=3), "plain")
    assert message(score_ahead, "ahead") == plain
    assert f"failed on sample {row} at step 3" in plain[0]


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
def test_the_culprit_alone_is_dropped_and_is_never_a_zero(make):
    scores = score_ahead(runner_of(bad_at(6, make), rows, failure="drop"), (1, 2, 0))
    assert scores.dropped.nonzero().flatten().tolist() == [6]
    assert scores.values["reward"].isnan().nonzero().flatten().tolist() == [6]
    assert scores.values["rows"].tolist() == list(range(GROUPS * SIZE))


def test_a_reward_of_the_main_thread_is_called_again_there(caplog):
    calls = []

    def here(completions):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("there is no event loop")
        return rows(completions)

    with caplog.at_level(logging.WARNING):
        scores = score_ahead(runner_of(watched(calls, here)))
    assert scores.values["reward"].tolist() == list(range(GROUPS * SIZE))
    assert [len(seen) for seen, _ in calls] == [SIZE, GROUPS * SIZE]  # no more after the first
    assert "there is no event loop" in caplog.text


def test_a_reward_that_sleeps_exceeds_its_limit_once_beside_the_rollout():
    calls, never = [], threading.Event()
    sleeper = watched(calls, lambda completions: never.wait(30) and rows(completions))
    with pytest.raises(RewardError, match=r"took longer than 0\.1 s"):
        score_ahead(runner_of(sleeper, timeout_s=0.1))
    assert [len(seen) for seen, _ in calls][:3] == [SIZE, GROUPS * SIZE, 1]


def test_an_interruption_passes_through():
    def interrupt(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_ahead(runner_of(interrupt, failure="drop"))


def test_a_closed_runner_ends_its_thread_and_may_begin_again():
    calls = []
    runner = runner_of(watched(calls))
    score_ahead(runner)
    runner.close()
    calls[0][1].join(10)
    assert not calls[0][1].is_alive()
    assert score_ahead(runner).values["reward"].tolist() == list(range(GROUPS * SIZE))
