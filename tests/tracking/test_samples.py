"""Transcripts, grids and curves: complete, legible and in the right place."""

import json
import math
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmgrpo.data import rows_to_prompts
from mmgrpo.protocols import Prompt, Sample
from mmgrpo.tracking import JsonlTracker, before_after, write_curve, write_samples, write_summary
from mmgrpo.tracking.curve import ticks
from mmgrpo.tracking.pictures import GAP, Cell, draw_grid, scale_to_cell
from mmgrpo.tracking.samples import pick_groups, prompt_text

SVG = "{http://www.w3.org/2000/svg}"


def texts(groups=3, size=4, note=""):
    return [
        Sample(Prompt(g, f"what is {g}?", (), {"answer": str(g)}), f"{note}say {g}.{n}", length=n)
        for g in range(groups)
        for n in range(size)
    ]


def pictures(groups=3, size=4, color=0):
    return [
        Sample(
            Prompt(g, f"the number {g}", (), {"labels": [g]}),
            image=Image.new("RGB", (16, 8), (color, 10 * g, 20 * n)),
        )
        for g in range(groups)
        for n in range(size)
    ]


def scores(count):
    return {"right": torch.arange(count).float() / count, "other": torch.full((count,), math.nan)}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- choosing ------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(1, 64))
def test_choices_are_the_first_of_whole_groups_within_the_limit(sizes, limit):
    prompts = [group for group, size in enumerate(sizes) for _ in range(size)]
    chosen = pick_groups(prompts, limit)
    flat = [position for group in chosen for position in group]
    assert 0 < len(flat) <= limit
    assert all(group and len({prompts[p] for p in group}) == 1 for group in chosen)
    assert [prompts[group[0]] for group in chosen] == list(range(len(chosen)))
    assert all(group == list(range(group[0], group[0] + len(group))) for group in chosen)
    if len(prompts) <= limit:
        assert len(flat) == len(prompts)


def test_sixteen_of_a_batch_are_four_of_four_groups():
    chosen = pick_groups([g for g in range(8) for _ in range(16)], 16)
    assert [len(group) for group in chosen] == [4, 4, 4, 4]
    assert [len(group) for group in pick_groups([0] * 64 + [1] * 64, 16)] == [8, 8]


# -- text ----------------------------------------------------------------------------------------


def test_a_transcript_shows_prompt_completion_scores_and_advantage(tmp_path):
    advantage = torch.tensor([[0.5, 0.5, 0.0]] * 12)
    path = write_samples(tmp_path, 7, texts(), scores(12), advantage)
    assert path == tmp_path / "samples" / "step_000007.md"
    text = path.read_text()
    assert "what is 2?" in text
    assert "say 2.3" in text
    assert "answer: `2`" in text
    assert "### right 0.08 · other n/a · advantage +0.50" in text
    records = rows(tmp_path / "samples" / "step_000007.jsonl")
    assert len(records) == 12
    assert records[1]["rewards"] == {"right": pytest.approx(1 / 12), "other": None}
    assert records[1]["advantage"] == 0.5
    assert records[1]["columns"] == {"answer": "0"}


def test_at_most_max_samples_and_evaluations_have_their_own_name(tmp_path):
    path = write_samples(tmp_path, 7, texts(8, 8), scores(64), max_samples=6, kind="eval")
    assert path.name == "step_000007_eval.md"
    assert len(rows(path.with_suffix(".jsonl"))) == 6


def test_backticks_cannot_break_out_of_a_transcript(tmp_path):
    sample = Sample(Prompt(0, "p"), "```\n# not a title\n````")
    text = write_samples(tmp_path, 1, [sample], {"r": torch.ones(1)}).read_text()
    assert "`````text\n```\n# not a title\n````\n`````" in text


def test_chats_are_shown_as_text_with_their_images(tmp_path):
    picture = Image.new("RGB", (9, 9), (200, 0, 0))
    (prompt,) = rows_to_prompts(
        [{"prompt": "which?", "images": [picture, picture]}], modality="vision", system_prompt="s"
    )
    assert prompt_text(prompt.content) == "system: s\nuser: [image][image]which?"
    path = write_samples(tmp_path, 1, [Sample(prompt, "a")] * 2, {"r": torch.ones(2)})
    assert "![prompts](step_000001.png)" in path.read_text()
    grid = Image.open(path.with_suffix(".png"))
    assert (200, 0, 0) in grid.get_flattened_data()


# -- images --------------------------------------------------------------------------------------


def test_images_become_one_grid_with_a_row_per_group(tmp_path):
    path = write_samples(tmp_path, 3, pictures(), scores(12), torch.ones(12))
    assert path == tmp_path / "samples" / "step_000003.png"
    assert len(rows(path.with_suffix(".jsonl"))) == 12
    grid = Image.open(path)
    step_x, scale = 16 * 6 + GAP, 6
    tops = [y for y in range(grid.height) if grid.getpixel((GAP, y)) == (0, 0, 0)]
    assert tops
    first = tops[-1] - 8 * scale + 1
    for n in range(4):
        for corner in ((0, 0), (16 * scale - 1, 8 * scale - 1)):
            pixel = (GAP + n * step_x + corner[0], first + corner[1])
            assert grid.getpixel(pixel) == (0, 0, 20 * n)
    colors = {color for _, color in grid.getcolors(1 << 20)}
    assert {(0, 10 * g, 20 * n) for g in range(3) for n in range(4)} <= colors


def test_groups_of_one_are_laid_out_in_rows_of_four(tmp_path):
    wide = Image.open(write_samples(tmp_path, 0, pictures(9, 1), scores(9)))
    assert wide.width == GAP + 4 * (96 + GAP)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 8), (300, 200), (1024, 512), (5000, 2)])
def test_cells_are_between_small_and_large(size):
    scaled = scale_to_cell(Image.new("L", size))
    assert 96 <= max(scaled.size) <= 320
    assert min(scaled.size) >= 1


def test_small_images_are_enlarged_without_smoothing():
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    assert len(scale_to_cell(image).getcolors()) == 2


def test_titles_that_are_too_long_or_strange_are_drawn():
    cells = [[Cell(Image.new("RGB", (8, 8)), ["a" * 500, "日本 \n é"])]]
    assert draw_grid(cells, ["x" * 1000]).width == 2 * GAP + 96


# -- before and after ----------------------------------------------------------------------------


def test_before_and_after_of_images_are_side_by_side(tmp_path):
    assert before_after(tmp_path) is None
    first = write_samples(tmp_path, 0, pictures(color=250), scores(12), kind="eval")
    assert before_after(tmp_path) is None
    write_samples(tmp_path, 50, pictures(color=99), scores(12), kind="eval")
    last = write_samples(tmp_path, 100, pictures(color=200), scores(12), kind="eval")
    write_samples(tmp_path, 100, pictures(color=1), scores(12))
    path = before_after(tmp_path)
    assert path == tmp_path / "before_after.png"
    picture = Image.open(path)
    assert picture.width > Image.open(first).width + Image.open(last).width
    half = picture.width // 2
    left = {color for _, color in picture.crop((0, 0, half, picture.height)).getcolors(1 << 20)}
    right = {color for _, color in picture.crop((half, 0, *picture.size)).getcolors(1 << 20)}
    assert (250, 10, 20) in left - right
    assert (200, 10, 20) in right - left


def test_before_and_after_of_text_share_their_prompts(tmp_path):
    write_samples(tmp_path, 1, texts(note="early "), scores(12))
    write_samples(tmp_path, 9, texts(note="late "), scores(12))
    text = before_after(tmp_path).read_text()
    assert text.count("## prompt") == 3
    assert text.index("what is 0?") < text.index("early say 0.0") < text.index("late say 0.0")
    assert text.index("late say 0.0") < text.index("what is 1?") < text.index("early say 1.0")


# -- curve ---------------------------------------------------------------------------------------


def test_the_curve_has_a_line_per_metric_at_the_right_heights(tmp_path):
    assert write_curve(tmp_path) is None
    log = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in range(11):
        metrics = {"reward/mean": step / 10 if step else math.nan}
        log.log(metrics | ({"eval/success": 0.5} if step % 5 == 0 else {}), step)
    root = ET.parse(write_curve(tmp_path)).getroot()
    lines = [p.get("d")[1:].split("L") for p in root.iterfind(f"{SVG}g/{SVG}path")]
    reward, success = ([tuple(map(float, p.split())) for p in line] for line in lines)
    assert (len(reward), len(success)) == (10, 3)
    assert success[0][1] == success[2][1]
    assert reward[-1][1] < success[0][1] < reward[0][1]
    assert reward[4] == success[1]  # 0.5 at step 5
    assert reward[0][0] < reward[-1][0] == success[-1][0]
    labels = [text.text for text in root.iterfind(f"{SVG}text")]
    assert {"reward", "success (held out)", "step", "0", "10", "0.2", "1"} <= set(labels)


def test_a_run_of_one_evaluation_has_a_curve(tmp_path):
    JsonlTracker(tmp_path / "metrics.jsonl").log({"eval/success": 0.0}, 0)
    assert ET.parse(write_curve(tmp_path)).getroot().tag == f"{SVG}svg"
    assert [path.name for path in write_summary(tmp_path)] == ["curve.svg"]


def test_a_title_is_escaped(tmp_path):
    folder = tmp_path / "a<b&c"
    JsonlTracker(folder / "metrics.jsonl").log({"eval/success": 0.0}, 0)
    ET.parse(write_curve(folder))


@given(st.floats(-1e9, 1e9), st.one_of(st.just(0.0), st.floats(1e-6, 1e9)), st.integers(2, 12))
def test_ticks_are_few_and_enclose_the_data(low, span, count):
    high = low + span
    marks = ticks(low, high, count)
    tolerance = 1e-6 * (abs(high) + abs(low) + 1)
    assert 2 <= len(marks) <= count + 1
    assert marks[0] <= low + tolerance
    assert marks[-1] >= high - tolerance
    assert marks == sorted(set(marks))
    assert len({f"{mark:g}" for mark in marks}) == len(marks)
