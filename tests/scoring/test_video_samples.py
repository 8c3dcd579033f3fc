"""Videos on their way to rewards, and on their way to the folder of failures."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from mmgrpo.errors import ConfigError, RewardError
from mmgrpo.protocols import Prompt, Sample
from mmgrpo.scoring import RewardRunner, check_modality, load_reward, load_rewards


def clip(shade):
    return [Image.new("L", (4, 4), shade + n) for n in range(3)]


def test_a_reward_gets_the_frames_and_the_columns():
    seen = {}

    def capture(prompts, videos, digit):
        seen.update(prompts=prompts, videos=videos, digit=digit)
        return [1.0, None]

    samples = [Sample(Prompt(n, f"p{n}", (), {"digit": n}), video=clip(10 * n)) for n in range(2)]
    scores = RewardRunner(load_rewards(capture)).score(samples, step=0)
    assert seen == {"prompts": ["p0", "p1"], "videos": [s.video for s in samples], "digit": [0, 1]}
    assert scores.values["capture"][0] == 1
    assert math.isnan(scores.values["capture"][1])


def test_rewards_that_look_at_something_else_are_refused():
    check_modality(load_reward(lambda videos: [0.0]), "video")
    with pytest.raises(ConfigError, match=r"asks for images; .*'video' have prompts, videos"):
        check_modality(load_reward(lambda images: [0.0]), "video")
    with pytest.raises(ConfigError, match=r"asks for videos; .*'image' have images, prompts"):
        check_modality(load_reward(lambda videos: [0.0]), "image")


def test_the_frames_of_a_failed_sample_are_saved(tmp_path):
    samples = [Sample(Prompt(0, "p"), video=clip(7))]
    runner = RewardRunner(load_rewards(lambda videos: [math.nan]), save_dir=tmp_path)
    with pytest.raises(RewardError, match="failed on sample 0 at step 4"):
        runner.score(samples, step=4)
    (record,) = (tmp_path / "failed_rewards").glob("*.json")
    names = json.loads(record.read_text())["samples"][0]["images"]
    shades = [Image.open(record.parent / name).getpixel((0, 0)) for name in names]
    assert shades == [7, 8, 9]
