"""The contract itself: each way of being broken is caught, by the check that is meant for it."""

import itertools
import math

import numpy as np
import pytest
from contract import (
    Case,
    alive,
    batch_invariant,
    check_contract,
    deterministic,
    in_range,
    monotone,
    order_free,
    runs,
)
from PIL import Image

from mmgrpo.errors import RewardError

PICTURES = [Image.new("RGB", (4, 4), (level,) * 3) for level in (200, 10, 90, 50)]
PROMPTS = ["bright"] * 4


def light(image):
    return float(np.asarray(image.convert("RGB")).mean()) / 255


def sound(images, prompts, **_columns):
    return [
        light(image) * len(prompt.split()) for image, prompt in zip(images, prompts, strict=True)
    ]


def of_batch(images, **_columns):
    values = [light(image) for image in images]
    return [value / max(values) for value in values]


def counting(images, calls=itertools.count(), **_columns):  # noqa: B008 - the state is the fault
    return [light(image) + 0.01 * next(calls) for image in images]


def takes_anything(images, prompts, **_columns):
    """What hides swapped arguments: everything has a score."""
    return [light(i) if isinstance(i, Image.Image) else 0.0 for i in images]


BROKEN = {
    in_range: lambda images, **_: [2 * light(image) for image in images],
    deterministic: counting,
    batch_invariant: of_batch,
    order_free: takes_anything,
    monotone: lambda images, **_: [1 - light(image) for image in images],
    alive: lambda images, **_: [0.5 for _image in images],
    runs: lambda images, **_: [math.nan if light(image) < 0.1 else 1.0 for image in images],
}


def test_a_sound_reward_passes():
    check_contract(Case(sound, PICTURES, {"prompts": PROMPTS}, low=0.0, high=1.0))


@pytest.mark.parametrize("check", BROKEN, ids=lambda check: check.__name__)
def test_each_fault_is_caught_by_its_check(check):
    case = Case(BROKEN[check], PICTURES, {"prompts": PROMPTS}, low=0.0, high=1.0)
    with pytest.raises((AssertionError, RewardError, pytest.fail.Exception)):
        check(case, case.score())
