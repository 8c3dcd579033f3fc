"""Videos among the samples: sheets that show every frame, animations that play them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmgrpo.protocols import Prompt, Sample
from mmgrpo.tracking import before_after, write_samples
from mmgrpo.tracking.clips import contact_sheet, evenly
from mmgrpo.tracking.pictures import MAX_CELL, PAPER


def clip(count=5, size=(16, 16), base=0):
    """Frame n is all of one colour, (base, 20 n, 0)."""
    return [Image.new("RGB", size, (base, 20 * n, 0)) for n in range(count)]


def samples(groups=2, size=3, count=5):
    return [
        Sample(Prompt(g, f"the digit {g} moves"), video=clip(count, base=100 * g + n))
        for g in range(groups)
        for n in range(size)
    ]


def colors(image):
    return {color for _, color in image.convert("RGB").getcolors(1 << 20)}


@given(st.integers(1, 200), st.integers(2, 30))
def test_frames_are_chosen_evenly_with_both_ends(count, limit):
    chosen = evenly(count, limit)
    assert len(chosen) == min(count, limit)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_a_short_clip_is_one_row_in_order():
    sheet = contact_sheet(clip())
    assert sheet.size == (5 * 17 - 1, 16)
    assert [sheet.getpixel((17 * n + 8, 8)) for n in range(5)] == [(0, 20 * n, 0) for n in range(5)]


def test_a_large_clip_is_a_square_of_nine():
    width, height = MAX_CELL, 180
    sheet = contact_sheet(clip(12, (width, height)))
    gap = width // 16
    assert sheet.size == (3 * (width + gap) - gap, 3 * (height + gap) - gap)
    shown = [
        sheet.getpixel((column * (width + gap) + 1, row * (height + gap) + 1))[1] // 20
        for row in range(3)
        for column in range(3)
    ]
    assert shown == evenly(12, 9)


def test_the_sheet_and_the_animation_are_written_beside_the_record(tmp_path):
    batch = samples()
    main = write_samples(tmp_path, 7, batch, {"right": torch.arange(6.0)})
    assert main == tmp_path / "samples" / "step_000007.png"
    names = {file.name for file in main.parent.iterdir()}
    assert names == {f"step_000007.{suffix}" for suffix in ("png", "gif", "jsonl")}
    found = colors(Image.open(main))
    for sample in batch:
        assert {frame.getpixel((0, 0)) for frame in sample.video} <= found
    with Image.open(main.with_suffix(".gif")) as playing:
        assert (playing.n_frames, playing.info["loop"]) == (5, 0)
        for number in range(5):
            playing.seek(number)
            greens = {green for red, green, blue in colors(playing) if blue == 0 and red < 210}
            assert 20 * number in {round(green / 20) * 20 for green in greens}
            assert playing.info["duration"] == pytest.approx(125, abs=5)


def test_videos_of_different_lengths_stop_at_their_last_frame(tmp_path):
    batch = [Sample(Prompt(0, "p"), video=clip(count)) for count in (2, 4)]
    main = write_samples(tmp_path, 1, batch, {"right": torch.full((2,), math.nan)})
    with Image.open(main.with_suffix(".gif")) as playing:
        assert playing.n_frames == 4
    assert PAPER == "white"


def test_before_and_after_show_the_sheets(tmp_path):
    for step in (0, 9):
        write_samples(tmp_path, step, samples(), {"right": torch.zeros(6)}, kind="eval")
    assert before_after(tmp_path) == tmp_path / "before_after.png"
