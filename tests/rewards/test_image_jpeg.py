"""JPEG size: exact on a file that is written, and ordered as detail is."""

import numpy as np
import pytest
from contract import Case, check_contract
from PIL import Image

from mmgrpo.errors import ConfigError
from mmgrpo.rewards.image_jpeg import ImageJpeg


def noise(strength, seed=0):
    values = np.random.default_rng(seed).normal(128, strength, (48, 64, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("quality", [30, 95])
def test_the_score_is_the_size_of_the_file(tmp_path, quality):
    picture = noise(40)
    picture.save(tmp_path / "picture.jpg", quality=quality)
    size = (tmp_path / "picture.jpg").stat().st_size / 1000
    assert ImageJpeg(quality=quality)(images=[picture]) == [-size]
    assert ImageJpeg("larger", quality)(images=[picture]) == [size]


def test_transparency_and_grey_are_encoded_as_colour():
    grey = noise(40).convert("L")
    same = grey.convert("RGB")
    assert ImageJpeg()(images=[grey, same.convert("RGBA")]) == ImageJpeg()(images=[same] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prefer": "small"}, "did you mean 'smaller'"), ({"quality": 0}, "from 1 to 95; got 0")],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageJpeg(**options)


@pytest.mark.parametrize("prefer", ["smaller", "larger"])
def test_contract(prefer):
    pictures = [noise(strength) for strength in (0, 60, 10, 30)]
    low, high = (-10.0, 0.0) if prefer == "smaller" else (0.0, 10.0)
    order = (0, 1) if prefer == "smaller" else (1, 0)
    check_contract(
        Case(ImageJpeg(prefer), pictures, {}, low, high, better=order[0], worse=order[1])
    )
