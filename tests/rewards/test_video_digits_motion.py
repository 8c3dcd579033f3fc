"""Moving digits: the tracker against where they were put, and the whole reward on real digits."""

import math
from pathlib import Path

import numpy as np
import pytest
from contract import Case, check_contract
from PIL import Image

import mmgrpo.playground
from mmgrpo.errors import ConfigError
from mmgrpo.playground.digits import load_digits
from mmgrpo.rewards.digit_tracking import Track, track
from mmgrpo.rewards.video_digits_motion import DIRECTIONS, VideoDigitsMotion, direction_score

CLASSIFIER = str(Path(mmgrpo.playground.__file__).parent / "assets/image/judge_classifier")
PIXELS, LABELS = load_digits("eval")


def digit(number, pick=0):
    return PIXELS[np.flatnonzero(number == LABELS)[pick]]


def clip(*moves, frames=5, size=(16, 16), noise=0.0, seed=0):
    """Frames of digits: each move is (8 x 8 pixels, (left, top) first, (right, down) a frame)."""
    rng = np.random.default_rng(seed)
    video = []
    for time in range(frames):
        canvas = np.zeros(size[::-1])
        for pixels, (left, top), (right, down) in moves:
            x, y = left + right * time, top + down * time
            canvas[y : y + 8, x : x + 8] = np.maximum(canvas[y : y + 8, x : x + 8], pixels)
        canvas = (canvas + rng.normal(0, noise, canvas.shape)).clip(0, 255)
        video.append(Image.fromarray(canvas.astype(np.uint8)).convert("RGB"))
    return video


def across(number, way, pick=0):
    starts = {"right": (0, 4), "left": (8, 4), "down": (4, 0), "up": (4, 8), "still": (4, 4)}
    steps = {"right": (2, 0), "left": (-2, 0), "down": (0, 2), "up": (0, -2), "still": (0, 0)}
    return clip((digit(number, pick), starts[way], steps[way]))


def gray(video):
    return np.stack([np.asarray(frame.convert("L"), dtype=np.float32) / 255 for frame in video])


@pytest.mark.parametrize("way", DIRECTIONS)
def test_one_digit_is_followed(way):
    for number in range(10):
        (found,) = track(gray(across(number, way)), 1, 8)
        unit = DIRECTIONS[way] or (0.0, 0.0)
        assert found.travel == pytest.approx((8 * unit[0], 8 * unit[1]), abs=0.4)
        whole = np.pad(digit(number), 1) / 255  # the centre of ink may be a pixel off the middle
        cuts = [whole[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        for picture in found.pictures:
            assert min(np.abs(picture - cut).max() for cut in cuts) < 0.01


def test_two_digits_keep_their_identity():
    """They pass each other in different rows; the nearest-place rule keeps them apart."""
    video = clip((digit(3), (0, 0), (3, 0)), (digit(7), (24, 12), (-3, 0)), size=(32, 20), frames=9)
    first, second = sorted(track(gray(video), 2, 8), key=lambda t: t.places[0][1])
    assert first.travel == pytest.approx((24, 0), abs=0.05)
    assert second.travel == pytest.approx((-24, 0), abs=0.05)
    assert all(place[1] < 10 for place in first.places)


def test_digits_that_flicker_keep_their_identity():
    """Which of them has the most ink changes from frame to frame."""
    frames = np.zeros((6, 20, 32), dtype=np.float32)
    for time, frame in enumerate(frames):
        frame[0:8, time : time + 8] = 1.0 if time % 2 else 0.5
        frame[12:20, 20:28] = 0.75
    first, second = sorted(track(frames, 2, 8), key=lambda t: t.places[0][1])
    assert first.travel == pytest.approx((5, 0), abs=1e-5)
    assert second.travel == pytest.approx((0, 0), abs=1e-5)


def test_travel_is_the_least_squares_line():
    rng = np.random.default_rng(0)
    places = rng.normal(size=(7, 2))
    slope = np.polyfit(np.arange(7), places, 1)[0] * 6
    assert Track(np.zeros((7, 8, 8)), tuple(map(tuple, places))).travel == pytest.approx(
        tuple(slope)
    )
    assert Track(np.zeros((1, 8, 8)), ((1.0, 2.0),)).travel == (0.0, 0.0)


def test_a_canvas_without_ink_or_room():
    (found,) = track(np.zeros((3, 16, 16), dtype=np.float32), 1, 8)
    assert found.travel == (0.0, 0.0)
    with pytest.raises(ValueError, match="no room for digits"):
        track(np.zeros((3, 7, 16), dtype=np.float32), 1, 8)


@pytest.mark.parametrize(
    ("travel", "way", "expected"),
    [
        ((5, 0), "right", 1.0),
        ((-5, 0), "right", 0.0),
        ((0, -5), "up", 1.0),
        ((3, 3), "down", math.sqrt(0.5)),
        ((1, 0), "right", 0.0),
        ((1, 0), "still", 1.0),
        ((5, 0), "still", 0.0),
    ],
)
def test_directions(travel, way, expected):
    assert direction_score(travel, way, 2.0) == pytest.approx(expected)


@pytest.fixture(scope="module")
def reward():
    return VideoDigitsMotion(CLASSIFIER, device="cpu")


@pytest.fixture(scope="module")
def strict():
    return VideoDigitsMotion(CLASSIFIER, reduce="all_correct", device="cpu")


def test_real_digits_are_read_and_followed(reward, strict):
    cases = [(n, way, pick) for n in range(10) for way in DIRECTIONS for pick in (1, 2)]
    videos = [across(*case) for case in cases]
    right = {"digit": [n for n, _, _ in cases], "direction": [way for _, way, _ in cases]}
    assert np.mean(strict(videos=videos, **right)) > 0.9
    assert np.mean(reward(videos=videos, **right)) > 0.9
    other = {"left": "right", "right": "left", "up": "down", "down": "still", "still": "up"}
    turned = right | {"direction": [other[way] for way in right["direction"]]}
    assert strict(videos=videos, **turned) == [0.0] * len(videos)
    assert 0.4 < np.mean(reward(videos=videos, **turned)) < 0.55
    misread = right | {"digit": [(n + 1) % 10 for n in right["digit"]]}
    assert np.mean(strict(videos=videos, **misread)) < 0.05


def test_two_digits_in_any_order(strict):
    video = clip((digit(3), (0, 0), (3, 0)), (digit(7), (24, 12), (-3, 0)), size=(32, 20), frames=9)
    for digits, ways, expected in (
        ([3, 7], ["right", "left"], 1.0),
        ([7, 3], ["left", "right"], 1.0),
        ([3, 7], ["left", "right"], 0.0),
        ([3, 3], ["right", "left"], 0.0),
    ):
        assert strict(videos=[video], digit=[digits], direction=[ways]) == [expected]


def test_contract(reward):
    videos = [across(4, "right"), across(7, "left"), across(4, "left"), across(1, "up")]
    videos.append(videos[0])
    columns = {
        "prompts": ["x"] * 5, "digit": [4, 4, 4, 1, None],
        "direction": ["right", "right", "right", "up", "up"],
    }  # fmt: skip
    check_contract(Case(reward, videos, columns, 0.0, 1.0, made="videos"))


@pytest.mark.parametrize(
    ("digits", "ways", "message"),
    [
        (12, "left", "from 0 to 9; got"),
        ("7", "left", "from 0 to 9; got"),
        ([1, 2], "left", "as many directions"),
        (1, None, "as many directions"),
        ([1] * 5, ["left"] * 5, "1 to 4 digits"),
        (1, "rigth", "did you mean 'right'"),
    ],
)
def test_a_bad_row_is_our_failure(reward, digits, ways, message):
    with pytest.raises(ValueError, match=message):
        reward(videos=[across(1, "up")], digit=[digits], direction=[ways])


def test_swapped_arguments_are_caught(reward):
    with pytest.raises(ValueError, match="list of one or more frames"):
        reward(videos=["up"], digit=[1], direction=["up"])
    with pytest.raises(ValueError, match="from 0 to 9"):
        reward(videos=[across(1, "up")], digit=["u"], direction=["up"])


def test_bad_options(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        VideoDigitsMotion(str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'all_correct'"):
        VideoDigitsMotion(CLASSIFIER, reduce="all_corect")
