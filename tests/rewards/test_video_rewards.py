"""Rewards on videos: frames, motion and a judge, against hand-made clips and a real HTTP server."""

import asyncio
import base64
import inspect
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from contract import Case, check_contract
from PIL import Image

from mmgrpo.errors import ConfigError, RewardError
from mmgrpo.protocols import Prompt, Sample
from mmgrpo.rewards.frames import sampled
from mmgrpo.rewards.judge_endpoint import JudgeFailure
from mmgrpo.rewards.video_frames import VideoFrames
from mmgrpo.rewards.video_judge import VideoJudge
from mmgrpo.rewards.video_motion import VideoMotion, dynamic, smooth
from mmgrpo.scoring.load import check_modality, load_reward
from mmgrpo.scoring.runner import RewardRunner


def gray(level, size=(8, 8)):
    return Image.new("RGB", size, (level,) * 3)


def clip(*levels):
    return [gray(level) for level in levels]


def light(image):
    return float(np.asarray(image.convert("L")).mean()) / 255


def brightness(images, **_columns):
    return [light(image) for image in images]


def wordy(images, prompts, words, *, bonus=0.0, **_columns):
    rows = zip(images, prompts, words, strict=True)
    return [light(i) + len(p.split()) + w + bonus if w else None for i, p, w in rows]


async def late(images, **_columns):
    await asyncio.sleep(0)
    return [light(image) for image in images]


def ranks(images, **_columns):
    """Depends on the other pictures of the call."""
    levels = [light(image) for image in images]
    return [float(sorted(levels).index(level)) for level in levels]


HERE = "test_video_rewards"


def framewise(name, **options):
    return VideoFrames(f"{HERE}:{name}", **options)


# -- which frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [(9, 3, [0, 4, 8]), (5, 5, [0, 1, 2, 3, 4]), (5, 1, [2]), (1, 3, [0, 0, 0]),
     (2, 4, [0, 0, 1, 1]), (10, 4, [0, 3, 6, 9])],
)  # fmt: skip
def test_frames_at_equal_distances(length, count, expected):
    video = clip(*range(length))
    assert [video.index(frame) for frame in sampled(video, count)] == expected


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "one or more frames"),
        (gray(1), "list of one or more frames"),
        ("a cat", "one or more frames"),
        ([gray(1), "x"], "must be pictures; got Image, str"),
    ],
)
def test_what_is_no_video(video, message):
    for reward in (framewise("brightness"), VideoMotion()):
        with pytest.raises(ValueError, match=message):
            reward(videos=[video], prompts=["x"])


# -- any reward on pictures ------------------------------------------------------------------------


def test_mean_and_worst_of_the_frames():
    videos = [clip(0, 51, 102, 255), clip(255, 255, 255, 0)]
    prompts = ["x", "y"]
    assert framewise("brightness")(videos=videos, prompts=prompts) == pytest.approx([0.4, 0.75])
    worst = framewise("brightness", reduce="min", frames=3)
    assert worst(videos=[clip(255, 51, 51, 51, 0)[:4], clip(255, 51, 255)], prompts=prompts) == (
        pytest.approx([0.2, 0.2])
    )


def test_prompts_columns_and_none_go_with_their_video():
    videos = [clip(0, 0), clip(255, 255), clip(255, 0)]
    scores = framewise("wordy", frames=2)(
        videos=videos, prompts=["one", "one two", "x"], words=[10, 100, None], other=[1, 2, 3]
    )
    assert scores == [11.0, 103.0, None]
    with pytest.raises(ValueError, match=r"'.*wordy' needs the column 'words'"):
        framewise("wordy")(videos=videos, prompts=["x"] * 3)


def test_frames_are_compared_with_those_at_the_same_time():
    videos = [clip(10, 200), clip(20, 100)]
    assert framewise("ranks", frames=2)(videos=videos, prompts=["x"] * 2) == [0.5, 0.5]


def test_an_async_reward_stays_async():
    async def run():
        result = framewise("late", frames=2)(videos=[clip(0, 255)], prompts=["x"])
        assert inspect.isawaitable(result)
        return await result

    assert asyncio.run(run()) == [0.5]
    reward = load_reward({"name": "video_frames", "options": {"reward": f"{HERE}:late"}})
    runner = RewardRunner([reward])
    samples = [Sample(Prompt(0, "x"), video=clip(0, 255))]
    assert runner.score(samples, step=0).values["video_frames"].tolist() == [0.5]
    runner.close()


def test_a_frame_that_is_nan_makes_the_video_nan():
    reward = framewise("brightness", reduce="min", frames=2)
    reward.fn = lambda images, **_: [float("nan") if light(i) > 0.5 else 1.0 for i in images]
    assert np.isnan(reward(videos=[clip(0, 255), clip(255, 0)], prompts=["x"] * 2)).all()


def test_bad_options_of_frames():
    with pytest.raises(ConfigError, match="unknown reward 'image_jpg'; did you mean 'image_jpeg'"):
        VideoFrames("image_jpg")
    with pytest.raises(ConfigError, match="no option 'qality'; did you mean 'quality'"):
        VideoFrames("image_jpeg", {"qality": 3})
    with pytest.raises(ConfigError, match="quality must be from 1 to 95"):
        VideoFrames("image_jpeg", {"quality": 0})
    with pytest.raises(ConfigError, match=r"image_clip.*missing.*'path'"):
        VideoFrames("image_clip")
    with pytest.raises(ConfigError, match="takes no images"):
        VideoFrames("exact_answer")
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        VideoFrames("image_jpeg", reduce="men")
    with pytest.raises(ConfigError, match="positive number; got 0"):
        VideoFrames("image_jpeg", frames=0)


def test_contract_of_frames():
    videos = [clip(250, 200, 250), clip(10, 20, 30), clip(90, 90, 90), clip(0, 255)]
    columns = {"prompts": ["x"] * 4}
    check_contract(Case(framewise("brightness"), videos, columns, 0.0, 1.0, made="videos"))


# -- motion ----------------------------------------------------------------------------------------


def moving(shift, frames=8, seed=0, blur=4):
    """A smooth pattern that moves ``shift`` pixels per frame."""
    line = np.random.default_rng(seed).random(200)
    line = np.convolve(line, np.ones(blur) / blur, mode="same")
    rows = [np.tile(line[t * shift : t * shift + 32], (32, 1)) for t in range(frames)]
    return [Image.fromarray((row * 255).astype(np.uint8)) for row in rows]


def flicker(frames=8):
    return [gray(255 if t % 2 else 0, (32, 32)) for t in range(frames)]


def still(frames=8):
    return [gray(90, (32, 32))] * frames


def test_measures_by_hand():
    fade = np.array([0.0, 0.2, 0.4, 0.6])[:, None, None] * np.ones((1, 3, 3))
    assert dynamic(fade, enough=0.8) == pytest.approx(0.25)
    assert smooth(fade) == pytest.approx(1.0)
    jump = np.array([0.0, 1.0, 0.0])[:, None, None] * np.ones((1, 3, 3))
    assert dynamic(jump, enough=0.5) == 1.0
    assert smooth(jump) == pytest.approx(0.0)
    half = jump.copy()
    half[:, :, 0] = 0  # a third of the picture is still
    assert dynamic(half, enough=2.0) == pytest.approx(1 / 3)
    assert smooth(half) == pytest.approx(1 / 3)


def test_motion_beats_stillness_and_flicker():
    score = VideoMotion()
    for rival in (still(), flicker()):
        good, bad = score(videos=[moving(1), rival])
        assert good > 0.5 > bad + 0.25
    assert VideoMotion("dynamic")(videos=[flicker(), still()]) == [1.0, 0.0]
    assert VideoMotion("smooth")(videos=[still(), flicker()]) == [1.0, pytest.approx(0.0)]


def test_more_motion_is_more_dynamic_and_less_smooth():
    videos = [moving(shift) for shift in (0, 1, 2, 4)]
    amounts = VideoMotion("dynamic", enough=1.0)(videos=videos)
    assert amounts == sorted(amounts)
    assert amounts[0] == 0.0
    evenness = VideoMotion("smooth")(videos=videos)
    assert evenness == sorted(evenness, reverse=True)


def test_short_videos_and_bad_options():
    assert VideoMotion("dynamic")(videos=[clip(3)]) == [0.0]
    assert VideoMotion("smooth")(videos=[clip(3), clip(0, 255)]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="same size"):
        VideoMotion()(videos=[[gray(0), gray(0, (4, 4))]])
    with pytest.raises(ConfigError, match="did you mean 'smooth'"):
        VideoMotion("smoth")
    with pytest.raises(ConfigError, match="enough must be positive; got 0"):
        VideoMotion(enough=0)


@pytest.mark.parametrize("measure", ["dynamic", "both"])
def test_contract_of_motion(measure):
    videos = [moving(1), still(), moving(1, seed=4), moving(3, frames=5)]
    reward = VideoMotion(measure, enough=0.3)
    check_contract(Case(reward, videos, {"prompts": ["x"] * 4}, 0.0, 1.0, made="videos"))


# -- a judge ---------------------------------------------------------------------------------------


class Judge:
    """A server that marks by the brightness of the last picture; it can be switched off."""

    def __init__(self):
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"data": [{"id": "eyes-7b"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(body)
                if judge.answers is not None and len(judge.requests) > judge.answers:
                    self.connection.close()  # died in the middle of a request
                    return
                answer = json.dumps({"score": judge.levels(body)[-1] / 25.5})
                self.reply({"choices": [{"message": {"content": answer}}]})

            def reply(self, body):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *arguments):
                pass

        self.requests, self.answers = [], None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True).start()

    @staticmethod
    def levels(request):
        parts = request["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        pictures = (Image.open(io.BytesIO(base64.b64decode(u.partition(",")[2]))) for u in urls)
        return [float(np.asarray(picture).mean()) for picture in pictures]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def judge():
    judge = Judge()
    yield judge
    judge.close()


def options(judge, **more):
    return {"url": judge.url, "model": "eyes-7b", "wait_s": 0.01, "timeout_s": 5.0, **more}


def test_the_judge_sees_the_frames_in_order(judge):
    reward = VideoJudge(**options(judge, frames=3))
    videos = [clip(0, 1, 50, 3, 255), clip(7, 8, 9, 10, 51)]
    assert asyncio.run(reward(videos=videos, prompts=["a {score} cat", "x"])) == [1.0, 0.2]
    assert [judge.levels(request) for request in judge.requests] == [[0, 50, 255], [7, 9, 51]]
    assert "a {score} cat" in judge.requests[0]["messages"][0]["content"][0]["text"]


def test_contract_of_the_judge(judge):
    videos = [clip(0, 200), clip(200, 10), clip(9, 90), clip(90)]
    reward = VideoJudge(**options(judge, frames=2))
    check_contract(Case(reward, videos, {"prompts": ["x"] * 4}, 0.0, 1.0, made="videos"))


@pytest.mark.parametrize(
    ("name", "more", "samples"),
    [
        (
            "video_judge",
            {"frames": 2},
            [Sample(Prompt(n, "x"), video=clip(n, 2)) for n in range(3)],
        ),
        ("image_judge", {}, [Sample(Prompt(n, "x"), image=gray(n)) for n in range(3)]),
    ],
)
@pytest.mark.parametrize("failure", ["stop", "drop"])
def test_a_judge_that_dies_stops_the_run_and_everything_is_saved(
    judge, tmp_path, name, more, samples, failure
):
    reward = load_reward({"name": name, "options": options(judge, retries=1, **more)})
    runner = RewardRunner([reward], failure=failure, save_dir=tmp_path)
    first = runner.score(samples, step=6)
    assert len(first.values[name]) == 3
    assert not first.dropped.any()
    judge.answers = len(judge.requests) + 1  # it dies after one more answer
    with pytest.raises(
        RewardError, match=rf"'{name}' failed .*step 7.*the judge at .* failed 2 times"
    ):
        runner.score(samples, step=7)
    runner.close()
    saved = json.loads((tmp_path / "failed_rewards" / f"step_000007_{name}.json").read_text())
    assert saved["samples"][0]["prompt"] == "x"
    files = [file for sample in saved["samples"] for file in sample["images"]]
    assert files
    assert all((tmp_path / "failed_rewards" / file).is_file() for file in files)
    assert len(saved["samples"][0]["images"]) == (2 if name == "video_judge" else 1)


def test_a_judge_that_is_down_at_the_start_is_one_sentence(judge):
    with pytest.raises(ConfigError, match=r"video_judge: no OpenAI-compatible endpoint .*refused"):
        VideoJudge("http://127.0.0.1:9/v1", "eyes-7b")
    with pytest.raises(ConfigError, match=r"video_judge: the question must contain \{prompt\}"):
        VideoJudge(**options(judge, question="?"))
    with pytest.raises(ConfigError, match="video_judge: frames must be a positive number"):
        VideoJudge(**options(judge, frames=0))
    judge.answers = 0
    with pytest.raises(JudgeFailure, match="failed 2 times"):
        asyncio.run(VideoJudge(**options(judge, retries=1))(videos=[clip(1)], prompts=["x"]))


# -- in a run --------------------------------------------------------------------------------------


def test_video_rewards_are_for_videos_only():
    reward = load_reward("video_motion")
    check_modality(reward, "video")
    with pytest.raises(ConfigError, match="asks for videos; samples of modality 'image'"):
        check_modality(reward, "image")
    with pytest.raises(ConfigError, match="asks for images; samples of modality 'video'"):
        check_modality(load_reward("image_jpeg"), "video")


@pytest.mark.parametrize("name", ["video_frames", "video_motion"])
def test_swapped_arguments_are_caught(name):
    built = {"video_frames": framewise("wordy"), "video_motion": VideoMotion()}[name]
    videos, prompts = [clip(1, 2), clip(3, 4)], ["a cat", "a dog"]
    with pytest.raises(ValueError, match=r"list of one or more frames"):
        built(videos=prompts, prompts=videos, words=[1, 2])
