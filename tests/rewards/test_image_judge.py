"""Rewards by a judge, against a real HTTP server that prefers brighter pictures or misbehaves."""

import asyncio
import base64
import contextlib
import io
import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from contract import Case, check_contract
from PIL import Image

from mmgrpo.errors import ConfigError, RewardError
from mmgrpo.protocols import Prompt, Sample
from mmgrpo.rewards.image_judge import ImageJudge
from mmgrpo.rewards.image_win_rate import ImageWinRate
from mmgrpo.rewards.judge_endpoint import JudgeFailure, read_object
from mmgrpo.scoring.load import load_reward
from mmgrpo.scoring.runner import RewardRunner


def gray(level):
    return Image.new("RGB", (8, 8), (level,) * 3)


def levels(request):
    parts = request["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return [float(np.asarray(picture).mean()) for picture in pictures]


def mark(request):
    return json.dumps({"score": levels(request)[0] / 25.5})


def brighter(request):
    first, second = levels(request)
    return json.dumps({"better": 0 if first == second else 1 if first > second else 2})


class Judge:
    """A server whose behaviour is set by the test; it keeps the requests it got.

    ``behave`` returns the answer's text, or (status, body).
    """

    def __init__(self):
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(judge.models)

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge.lock:
                    judge.requests.append(request)
                    judge.keys.append(self.headers.get("Authorization"))
                answer = judge.behave(request)
                if isinstance(answer, str):
                    message = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                    answer = (200, json.dumps(message))
                self.reply(answer)

            def reply(self, answer):
                status, body = answer
                with contextlib.suppress(BrokenPipeError):  # the client gave up
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *arguments):
                pass

        self.behave = mark
        self.models = (200, json.dumps({"data": [{"id": "eyes-7b"}]}))
        self.requests, self.keys, self.lock = [], [], threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        serve = threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True)
        serve.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def judge():
    judge = Judge()
    yield judge
    judge.close()


def score(reward, images, prompts):
    return asyncio.run(reward(images=images, prompts=prompts))


def built(reward, judge, **options):
    return reward(judge.url, "eyes-7b", **{"wait_s": 0.01, "timeout_s": 5.0, **options})


# -- pointwise -----------------------------------------------------------------------------------


def test_marks_are_brought_to_0_1(judge):
    pictures = [gray(level) for level in (0, 51, 255)]
    scores = score(built(ImageJudge, judge), pictures, ["a {score} %s cat"] * 3)
    assert scores == pytest.approx([0.0, 0.2, 1.0])
    request = judge.requests[0]
    assert request["model"] == "eyes-7b"
    assert request["response_format"] == {"type": "json_object"}
    text = request["messages"][0]["content"][0]["text"]
    assert "a {score} %s cat" in text
    assert '{"score": N}' in text


def test_another_question_and_scale(judge):
    judge.behave = lambda request: '```json\n{"score": 2, "reason": "so so"}\n```'
    reward = built(ImageJudge, judge, question="Mark {prompt}", scale=[1, 5])
    assert score(reward, [gray(0)], ["x"]) == [0.25]
    assert judge.requests[0]["messages"][0]["content"][0]["text"] == "Mark x"


@pytest.mark.parametrize(
    "answer",
    ["seven", '{"score": "7"}', '{"score": 11}', '{"mark": 7}', "[7]", '{"score": true}', "",
     '{"score": NaN}', '{"score": null}'],
)  # fmt: skip
def test_an_unreadable_mark_is_asked_again_and_then_raises(judge, answer):
    judge.behave = lambda request: answer
    with pytest.raises(JudgeFailure, match="from 0 to 10; the judge answered"):
        score(built(ImageJudge, judge, retries=2), [gray(9)], ["x"])
    assert len(judge.requests) == 3
    answers = iter([answer, '{"score": 4}'])
    judge.behave = lambda request: next(answers)
    assert score(built(ImageJudge, judge), [gray(9)], ["x"]) == [0.4]


# -- the endpoint --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [(503, "starting"), (429, "slow down"), (200, "<html>"), (200, "{}"), (200, '{"choices": []}')],
)
def test_passing_trouble_is_waited_for(judge, trouble):
    answers = iter([trouble, trouble, '{"score": 10}'])
    judge.behave = lambda request: next(answers)
    assert score(built(ImageJudge, judge, retries=2), [gray(1)], ["x"]) == [1.0]
    judge.behave = lambda request: trouble
    with pytest.raises(JudgeFailure, match=r"failed 3 times: "):
        score(built(ImageJudge, judge, retries=2), [gray(1)], ["x"])


def test_a_refusal_is_not_repeated(judge):
    judge.behave = lambda request: (400, "the model takes one picture at most")
    with pytest.raises(JudgeFailure, match=r"HTTP status 400 \(the model takes one picture"):
        score(built(ImageJudge, judge), [gray(1)], ["x"])
    assert len(judge.requests) == 1


def test_a_slow_judge_is_given_up(judge):
    release = threading.Event()
    judge.behave = lambda request: str(release.wait(5))
    begun = time.monotonic()
    with pytest.raises(JudgeFailure, match=r"failed 2 times: no answer within 0\.2 s"):
        score(built(ImageJudge, judge, timeout_s=0.2, retries=1), [gray(1)], ["x"])
    assert time.monotonic() - begun < 3
    release.set()


def test_requests_overlap_up_to_the_limit(judge):
    present, most, lock = [0], [0], threading.Lock()

    def behave(request):
        with lock:
            present[0] += 1
            most[0] = max(most[0], present[0])
        time.sleep(0.05)
        with lock:
            present[0] -= 1
        return '{"score": 1}'

    judge.behave = behave
    score(built(ImageJudge, judge, concurrency=3), [gray(1)] * 12, ["x"] * 12)
    assert most[0] == 3


def test_the_key_comes_from_the_environment(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "opensesame")
    score(built(ImageJudge, judge, api_key_env="JUDGE_KEY"), [gray(1)], ["x"])
    score(built(ImageJudge, judge), [gray(1)], ["x"])
    assert judge.keys == ["Bearer opensesame", None]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
        built(ImageJudge, judge, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize("reward", [ImageJudge, ImageWinRate])
def test_what_is_wrong_at_the_start_is_one_sentence(judge, reward):
    with pytest.raises(ConfigError, match=r"no OpenAI-compatible endpoint answers at .*refused"):
        reward("http://127.0.0.1:9/v1", "eyes-7b")
    with pytest.raises(ConfigError, match="must start with http://"):
        reward("localhost:8000/v1", "eyes-7b")
    with pytest.raises(ConfigError, match=r"does not serve 'eyes-8b'; did you mean 'eyes-7b'"):
        reward(judge.url, "eyes-8b")
    with pytest.raises(ConfigError, match=r"must contain \{prompt\}"):
        built(reward, judge, question="?")
    with pytest.raises(ConfigError, match="unknown option 'urls'; did you mean 'url'"):
        load_reward({"name": "image_judge", "options": {"urls": judge.url}})
    with pytest.raises(ConfigError, match="from low to high"):
        built(ImageJudge, judge, scale=[10, 0])
    judge.models = (401, "no key")
    with pytest.raises(ConfigError, match=r"status 401.*api_key_env"):
        built(reward, judge)
    judge.models = (404, "no such page")
    built(reward, judge)


def samples(levels, prompts):
    return [
        Sample(Prompt(index, prompt), image=gray(level))
        for index, (level, prompt) in enumerate(zip(levels, prompts, strict=True))
    ]


@pytest.mark.parametrize("name", ["image_judge", "image_win_rate"])
@pytest.mark.parametrize("failure", ["stop", "drop"])
def test_an_endpoint_that_goes_down_stops_the_run(judge, name, failure):
    options = {"url": judge.url, "model": "eyes-7b", "wait_s": 0.01, "retries": 1}
    reward = load_reward({"name": name, "options": options})
    judge.behave = lambda request: (503, "out of memory")
    runner = RewardRunner([reward], failure=failure)
    with pytest.raises(RewardError, match=r"503 \(out of memory\)"):
        runner.score(samples([1, 2], ["x", "x"]), step=3)
    runner.close()


# -- pairwise ------------------------------------------------------------------------------------


def test_win_rates_are_those_of_all_pairs(judge):
    judge.behave = brighter
    shades = [10, 60, 60, 200, 30, 90]
    prompts = ["a", "a", "a", "a", "b", "b"]
    order = [4, 0, 3, 5, 1, 2]
    expected = [0.0, 0.5, 0.5, 1.0, 0.0, 1.0]
    scores = score(
        built(ImageWinRate, judge), [gray(shades[i]) for i in order], [prompts[i] for i in order]
    )
    assert scores == pytest.approx([expected[i] for i in order])
    shown = sorted(tuple(levels(request)) for request in judge.requests)
    both = [*itertools.permutations(shades[:4], 2), *itertools.permutations(shades[4:], 2)]
    assert shown == sorted(both)


def test_a_judge_that_likes_a_position_is_neutral_only_with_the_swap(judge):
    judge.behave = lambda request: '{"better": 1}'
    pictures = [gray(level) for level in (1, 2, 3)]
    assert score(built(ImageWinRate, judge), pictures, ["x"] * 3) == [0.5] * 3
    assert score(built(ImageWinRate, judge, swap=False), pictures, ["x"] * 3) == [1.0, 0.5, 0.0]


def test_a_worked_example(judge):
    """Wins (3, .5, 1, 1.5) of 3: an answer that cannot be read is half a win for each."""
    winner = {(0, 1): 0, (0, 2): 0, (0, 3): 0, (1, 3): 3}

    def behave(request):
        shown = [round(level) // 10 for level in levels(request)]
        pair = tuple(sorted(shown))
        if pair == (1, 2):
            return "hard to say"
        return json.dumps({"better": 1 + shown.index(winner[pair]) if pair in winner else 0})

    judge.behave = behave
    rates = score(built(ImageWinRate, judge), [gray(10 * k) for k in range(4)], ["x"] * 4)
    assert rates == pytest.approx([1.0, 0.5 / 3, 1 / 3, 0.5])
    assert sum(rates) == pytest.approx(4 / 2)


def test_dimensions_count_beside_the_whole(judge):
    """.3 overall + .7 mean of the dimensions; what is not said is half a win."""
    said = []

    def behave(request):
        said.append(json.dumps(request))
        first, second = levels(request)
        brighter, reddish = 1 + (second > first), 1 + (first > second)
        return json.dumps({"better": brighter, "style": reddish, "text": brighter})

    judge.behave = behave
    pictures = [gray(level) for level in (10, 20)]
    dimensions = {"style": 1.0, "text": 3.0, "layout": 4.0}
    reward = built(ImageWinRate, judge, dimensions=dimensions)
    win = 0.3 * 1 + 0.7 * (1 * 0 + 3 * 1 + 4 * 0.5) / 8
    assert score(reward, pictures, ["x"] * 2) == pytest.approx([1 - win, win])
    assert all("style, text, layout" in request for request in said)
    whole = built(ImageWinRate, judge, dimensions=dimensions, share=0.0)
    assert score(whole, pictures, ["x"] * 2) == [0.0, 1.0]
    for wrong in ({"share": 1.5}, {"dimensions": {"better": 1}}, {"dimensions": {"a": 0}}):
        with pytest.raises(ConfigError, match="image_win_rate"):
            built(ImageWinRate, judge, **wrong)


def test_a_picture_without_others_is_level_and_a_dead_judge_is_noticed(judge):
    judge.behave = brighter
    reward = built(ImageWinRate, judge, retries=0)
    assert score(reward, [gray(1), gray(2)], ["x", "y"]) == [0.5, 0.5]
    judge.behave = lambda request: (500, "gone")
    with pytest.raises(JudgeFailure, match="500"):
        score(reward, [gray(1)], ["x"])


def test_nothing_but_unreadable_answers_raises(judge):
    judge.behave = lambda request: "the left one"
    with pytest.raises(JudgeFailure, match="none of the judge's answers could be read"):
        score(built(ImageWinRate, judge), [gray(1), gray(2)], ["x", "x"])


def test_one_group_that_fails_is_marked_and_logged(judge, caplog):
    def behave(request):
        return (500, "gone") if 7.0 in levels(request) else brighter(request)

    judge.behave = behave
    pictures = [gray(level) for level in (1, 2, 7, 8)]
    scores = score(built(ImageWinRate, judge, retries=0), pictures, ["x", "x", "y", "y"])
    assert scores[:2] == [0.0, 1.0]
    assert np.isnan(scores[2:]).all()
    assert "500 (gone)" in caplog.text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        (' ```json\n{"a": 1}\n``` ', {"a": 1}),
        ('Sure: {"a": 1}', None),
        ("[1]", None),
        ("1", None),
        ("", None),
    ],
)
def test_only_a_json_object_is_an_answer(answer, expected):
    assert read_object(answer) == expected


# -- the contract --------------------------------------------------------------------------------

PICTURES = [gray(level) for level in (200, 10, 90, 90)]


def test_contract_of_marks(judge):
    columns = {"prompts": ["x", "x", "y", "y"]}
    check_contract(Case(built(ImageJudge, judge), PICTURES, columns, low=0.0, high=1.0))


def test_contract_of_win_rates(judge):
    judge.behave = brighter
    columns = {"prompts": ["x", "x", "x", "y"]}
    reward = built(ImageWinRate, judge)
    check_contract(Case(reward, PICTURES, columns, low=0.0, high=1.0, grouped=True))
