"""What rewards are given, and that one which fails is never a 0."""

import asyncio
import json
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmgrpo.data import rows_to_prompts
from mmgrpo.errors import ConfigError, RewardError
from mmgrpo.protocols import Prompt, Sample
from mmgrpo.scoring import RewardRunner, load_reward, load_rewards
from mmgrpo.scoring import runner as runner_module

FILE = str(Path(__file__).parent / "user_rewards.py")


def texts(count=4, **columns):
    return [
        Sample(Prompt(i, f"p{i}", (), {k: v[i] for k, v in columns.items()}), f"c{i}", length=i)
        for i in range(count)
    ]


def named(name, fn):
    fn.__name__ = name
    return fn


def run(*functions, samples=None, **options):
    runner = RewardRunner(load_rewards(list(functions)), **options)
    try:
        return runner.score(texts() if samples is None else samples, step=3)
    finally:
        runner.close()


def values(scores, name):
    return [None if math.isnan(v) else v for v in scores.values[name].tolist()]


def bad_at(index, make):
    """A reward that scores 1, except where ``make`` says what happens."""

    def reward(completions):
        return [make() if c == f"c{index}" else 1.0 for c in completions]

    return reward


def raise_error():
    raise KeyError("no such key")


# -- what rewards are given ----------------------------------------------------------------------


def capture(seen):
    def reward(**columns):
        seen.update(columns)
        return [0.0] * len(columns["prompts"])

    return reward


def test_text_rewards_get_strings_and_columns():
    seen = {}
    run(capture(seen), samples=texts(2, answer=["a", "b"]))
    assert seen == {
        "prompts": ["p0", "p1"],
        "completions": ["c0", "c1"],
        "answer": ["a", "b"],
        "lengths": [0, 1],
        "truncated": [False, False],
    }


def test_chat_prompts_are_answered_by_messages():
    seen = {}
    prompt = Prompt(0, [{"role": "user", "content": "hi"}])
    run(capture(seen), samples=[Sample(prompt, "yo")])
    assert seen["prompts"] == [prompt.content]
    assert seen["completions"] == [[{"role": "assistant", "content": "yo"}]]
    assert "lengths" not in seen


def test_generators_get_images_and_vision_models_their_prompts_images():
    seen, picture = {}, Image.new("RGB", (2, 2), (255, 0, 0))
    run(capture(seen), samples=[Sample(Prompt(0, "p", (), {"labels": [1]}), image=picture)])
    assert seen == {"prompts": ["p"], "images": [picture], "labels": [[1]]}
    (prompt,) = rows_to_prompts([{"prompt": "p", "images": [picture]}], modality="vision")
    run(capture(seen), samples=[Sample(prompt, "c")])
    assert seen["images"][0][0].getpixel((0, 0)) == (255, 0, 0)


def test_a_column_that_a_row_lacks_is_none_and_reserved_names_are_the_samples():
    seen = {}
    samples = [
        Sample(Prompt(0, "p0", (), {"a": 1, "completions": "mine", "lengths": 9}), "c0"),
        Sample(Prompt(1, "p1"), "c1"),
    ]
    run(capture(seen), samples=samples)
    assert seen["a"] == [1, None]
    assert seen["completions"] == ["c0", "c1"]
    assert "lengths" not in seen


def test_only_named_arguments_are_passed_and_options_stay_bound():
    samples = texts(2, answer=["c0", "x"], scale=[9, 9], offset=[9, 9], other=[0, 0])
    scores = run({"name": f"{FILE}:with_options", "options": {"scale": 2}}, samples=samples)
    assert values(scores, "with_options") == [2.0, 0.0]


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        [1, None, 0.5, True],
        (1, None, 0.5, True),
        [np.float32(1), None, np.int64(1) / 2, torch.tensor(1.0)],
    ],
)
def test_numbers_and_none_become_float32_with_nan_for_none(result):
    scores = run(named("r", lambda completions: result))
    assert values(scores, "r") == [1.0, None, 0.5, 1.0]
    assert scores.values["r"].dtype == torch.float32
    assert scores.values["r"].shape == (4,)
    assert not scores.dropped.any()


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_tensors_and_arrays_are_values(make):
    assert values(run(named("r", lambda completions: make([1.0, 2, 3, 4]))), "r") == [1, 2, 3, 4]


def test_every_reward_is_called_once_with_all_samples():
    calls = []

    def reward(completions):
        calls.append(len(completions))
        return [0.0] * len(completions)

    run(reward, samples=texts(7))
    assert calls == [7]


def test_no_samples_call_nothing():
    scores = run(named("r", lambda completions: raise_error()), samples=[])
    assert scores.values["r"].shape == scores.dropped.shape == (0,)


def test_weights_and_seconds():
    slow = named("slow", lambda completions: time.sleep(0.05) or [0.0] * 4)
    runner = RewardRunner(load_rewards([{"name": slow, "weight": 0.5}, "tag_format"]))
    assert runner.weights == {"slow": 0.5, "tag_format": 1.0}
    seconds = runner.score(texts(), step=0).seconds
    assert seconds["slow"] >= 0.05 > seconds["tag_format"] >= 0


# -- failures: stop ------------------------------------------------------------------------------

BROKEN = {
    "raises": (raise_error, "KeyError"),
    "nan": (lambda: math.nan, "nan instead of a finite number"),
    "inf": (lambda: -math.inf, "-inf instead of a finite number"),
    "too large for float32": (lambda: 1e39, "instead of a finite number"),
    "text": (lambda: "1.0", "'1.0' instead of a finite number"),
    "list": (lambda: [1.0], "instead of a finite number"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_a_failing_reward_stops_the_run_and_saves_the_sample(tmp_path, broken, timeout_s):
    make, cause = broken
    reward = named("mine", bad_at(2, make))
    with pytest.raises(RewardError, match=r"reward 'mine' failed on sample 2 at step 3") as caught:
        run(reward, save_dir=tmp_path, timeout_s=timeout_s)
    assert cause in str(caught.value)
    assert caught.value.exit_code == 1
    record = json.loads((tmp_path / "failed_rewards" / "step_000003_mine.json").read_text())
    (sample,) = record["samples"]
    assert (sample["sample"], sample["prompt"], sample["completion"]) == (2, "p2", "c2")
    assert cause in sample["cause"]


def test_the_cause_is_chained_and_its_traceback_saved(tmp_path):
    with pytest.raises(RewardError) as caught:
        run(named("mine", bad_at(0, raise_error)), save_dir=tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)
    (file,) = (tmp_path / "failed_rewards").glob("*.json")
    assert "raise_error" in json.loads(file.read_text())["traceback"]


@pytest.mark.parametrize("failure", ["stop", "drop"])
@pytest.mark.parametrize(
    ("result", "cause"),
    [
        ([1.0] * 5, "5 values for"),
        ([], "0 values for"),
        (None, "returned NoneType instead of a list"),
        (1.0, "returned float"),
        ({"a": 1}, "returned dict"),
        ("1111", "returned str"),
    ],
)
def test_the_wrong_number_or_kind_of_values_stops_the_run(result, cause, failure):
    with pytest.raises(RewardError, match=cause):
        run(named("mine", lambda completions: result), failure=failure)


def test_a_missing_argument_is_a_failure_of_the_reward():
    penalty = {"name": "length_penalty", "options": {"max_length": 8, "buffer": 4}}
    samples = [Sample(Prompt(0, "p"), "c")]
    with pytest.raises(RewardError, match="lengths"):
        run(penalty, samples=samples)


def test_a_reward_that_fails_only_on_the_whole_says_so():
    def reward(completions):
        if len(completions) > 1:
            raise MemoryError("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"a call with 4 samples.*each sample alone succeeds"):
        run(reward)
    assert values(run(reward, failure="drop"), "reward") == [1.0] * 4


def test_images_of_a_failed_sample_are_saved(tmp_path):
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    samples = [Sample(Prompt(0, "p"), image=picture)]
    for _ in range(2):
        with pytest.raises(RewardError):
            run(named("a/b", lambda images: [math.nan]), samples=samples, save_dir=tmp_path)
    folder = tmp_path / "failed_rewards"
    assert sorted(p.name for p in folder.iterdir()) == [
        "step_000003_a_b.json",
        "step_000003_a_b_2.json",
        "step_000003_a_b_2_sample0_0.png",
        "step_000003_a_b_sample0_0.png",
    ]
    assert Image.open(folder / "step_000003_a_b_sample0_0.png").getpixel((0, 0)) == (1, 2, 3)


def test_control_c_passes_through():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bad_at(0, interrupt), failure="drop")


# -- failures: drop ------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_only_the_culprit_is_dropped_and_nothing_is_zero(tmp_path, broken):
    good = named("good", lambda completions: [2.0] * len(completions))
    scores = run(named("mine", bad_at(1, broken[0])), good, failure="drop", save_dir=tmp_path)
    assert scores.dropped.tolist() == [False, True, False, False]
    assert values(scores, "mine") == [1.0, None, 1.0, 1.0]
    assert values(scores, "good") == [2.0] * 4
    assert len(list((tmp_path / "failed_rewards").glob("*.json"))) == 1


def test_each_reward_drops_its_own(caplog):
    first = named("first", bad_at(0, raise_error))
    second = named("second", bad_at(3, lambda: math.nan))
    scores = run(first, second, failure="drop")
    assert scores.dropped.tolist() == [True, False, False, True]
    assert "reward 'first' failed on 1 of 4 samples" in caplog.text


def test_not_applicable_is_not_dropped():
    scores = run(named("r", bad_at(1, lambda: None)), failure="drop")
    assert not scores.dropped.any()
    assert values(scores, "r") == [1.0, None, 1.0, 1.0]


@pytest.mark.parametrize("make", [raise_error, lambda: math.nan])
def test_a_reward_that_fails_on_everything_stops_the_run(make):
    def reward(completions):
        return [make() for _ in completions]

    with pytest.raises(RewardError):
        run(reward, failure="drop")


# -- time ----------------------------------------------------------------------------------------


def test_a_sleeping_reward_exceeds_its_limit():
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"failed on sample 1 .*took longer than 0.2 s"):
        run(bad_at(1, lambda: time.sleep(30)), timeout_s=0.2)
    assert time.perf_counter() - start < 3


def test_a_sleeping_reward_drops_the_sample_on_which_it_sleeps():
    scores = run(bad_at(1, lambda: time.sleep(30)), timeout_s=0.2, failure="drop")
    assert scores.dropped.tolist() == [False, True, False, False]
    assert values(scores, "reward") == [1.0, None, 1.0, 1.0]


def test_the_search_for_culprits_ends(monkeypatch):
    monkeypatch.setattr(runner_module, "SEARCH_FLOOR_S", 0.0)
    monkeypatch.setattr(runner_module, "SEARCH_FACTOR", 2.0)

    def reward(completions):
        time.sleep(30)

    start = time.perf_counter()
    with pytest.raises(RewardError, match="took longer"):
        run(reward, samples=texts(100), timeout_s=0.1, failure="drop")
    assert time.perf_counter() - start < 3


def test_the_time_limit_is_for_the_call_not_for_errors_of_that_name():
    def reward(completions):
        raise TimeoutError("the server said so")

    with pytest.raises(RewardError, match="TimeoutError: the server said so"):
        run(reward, timeout_s=5.0)


def test_sync_rewards_stay_in_the_main_thread_unless_limited():
    threads = []

    def reward(completions):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    run(reward)
    run(reward, timeout_s=5)
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_a_reward_that_keeps_time_itself_stays_in_the_main_thread():
    threads = []

    def reward(completions):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    reward.keeps_time = True
    run(reward, timeout_s=5)
    assert threads == [threading.main_thread()]
    assert load_reward("math_answer").keeps_time


# -- async ---------------------------------------------------------------------------------------


def sleeper(name, seconds=0.3):
    async def reward(completions):
        await asyncio.sleep(seconds)
        return [1.0] * len(completions)

    return named(name, reward)


def test_async_rewards_run_side_by_side_and_beside_sync_ones():
    """Each waits until all three have started, so one after the other would time out."""
    meeting = threading.Barrier(3)

    def meet(name):
        async def reward(completions):
            await asyncio.to_thread(meeting.wait, 10)
            return [1.0] * len(completions)

        return named(name, reward)

    busy = named("busy", lambda completions: [2.0] * 4 if meeting.wait(10) >= 0 else [])
    scores = run(meet("a"), busy, meet("b"))
    assert values(scores, "a") == values(scores, "b") == [1.0] * 4
    assert values(scores, "busy") == [2.0] * 4
    assert list(scores.values) == ["a", "busy", "b"]


def test_the_seconds_of_an_async_reward_are_its_own():
    busy = named("busy", lambda completions: time.sleep(0.6) or [2.0] * 4)
    seconds = run(sleeper("a", 0.1), busy).seconds
    assert 0.09 < seconds["a"] < 0.6 < seconds["busy"]


def test_async_classes_and_functions_that_return_awaitables():
    bonus = {"name": f"{FILE}:AsyncBonus", "options": {"amount": 2}}
    inner = sleeper("inner", 0.01)

    def wrapped(completions):
        return inner(completions)

    scores = run(bonus, wrapped)
    assert values(scores, "AsyncBonus") == [2.0] * 4
    assert values(scores, "wrapped") == [1.0] * 4


def test_the_event_loop_survives_from_step_to_step():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    runner = RewardRunner(load_rewards([reward]))
    runner.score(texts(), step=0)
    runner.score(texts(), step=1)
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()
    runner.close()


def test_async_rewards_work_inside_a_running_loop():
    async def main():
        return run(sleeper("a", 0.01))

    assert values(asyncio.run(main()), "a") == [1.0] * 4


def test_async_failures_and_limits():
    async def fails(completions):
        await asyncio.sleep(0)
        return [raise_error() if c == "c2" else 1.0 for c in completions]

    async def sleeps(completions):
        if "c1" in completions:
            await asyncio.sleep(30)
        return [1.0] * len(completions)

    scores = run(fails, sleeps, failure="drop", timeout_s=0.2)
    assert scores.dropped.tolist() == [False, True, True, False]
    with pytest.raises(RewardError, match=r"'sleeps' failed on sample 1 .*took longer than 0.2 s"):
        run(sleeps, timeout_s=0.2)


def test_async_samples_are_retried_side_by_side():
    """Each retry waits until all of them have started."""
    started, all_started = [], asyncio.Event()

    async def reward(completions):
        if len(completions) > 1:
            raise_error()
        started.append(completions[0])
        if len(started) == 20:
            all_started.set()
        await asyncio.wait_for(all_started.wait(), 10)
        return [raise_error() if c == "c0" else 1.0 for c in completions]

    assert run(reward, samples=texts(20), failure="drop").dropped.sum() == 1


def test_an_async_reward_that_blocks_its_loop_is_given_up(monkeypatch):
    monkeypatch.setattr("mmgrpo.scoring.call.GRACE_S", 0.1)

    async def blocks(completions):
        time.sleep(6)
        return [1.0] * len(completions)

    runner = RewardRunner(load_rewards([blocks]), timeout_s=0.1)
    start = time.perf_counter()
    with pytest.raises(RewardError, match="took longer"):
        runner.score(texts(1), step=0)
    assert time.perf_counter() - start < 5


# -- set-up --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ([], {}, "at least one"),
        (["tag_format"], {"failure": "stopp"}, "did you mean 'stop'?"),
        (["tag_format"], {"timeout_s": 0}, "positive"),
    ],
)
def test_a_runner_that_makes_no_sense(rewards, options, expected):
    with pytest.raises(ConfigError, match=expected):
        RewardRunner(load_rewards(rewards), **options)
