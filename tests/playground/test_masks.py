"""The mask playground: raw masks that can be checked, demonstrations, and the folder that ships."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmgrpo.config.paths import locate
from mmgrpo.playground import masks
from mmgrpo.playground.masks import (
    CODEC,
    INK,
    Course,
    Lesson,
    Teacher,
    build_masks,
    draw_mask_scene,
    extend_model,
    mask_of,
    run_lengths,
)
from mmgrpo.playground.scenes import WIDE_CANVAS, render
from mmgrpo.playground.sft import IGNORED_LABEL
from mmgrpo.rewards.mask_files import load_codec, read_mask
from mmgrpo.rewards.mask_tokens import MaskTokens, iou

LESSON = Lesson(2, 1e-3, wrong_share=0.5, most_codes=16, batch_size=64)
SHORT = Course((replace(LESSON, batch_size=4),) * 2, codec_steps=4, codec_masks=256)


@pytest.fixture(scope="module")
def shipped():
    return load_codec(locate("playground:masks/codec"))


@pytest.fixture(scope="module")
def rows():
    text = Path(locate("playground:masks/eval.jsonl")).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_build_is_complete_and_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "NUM_TRAIN", 6)
    monkeypatch.setattr(masks, "NUM_EVAL", 4)
    for name in ("one", "two"):
        build_masks(tmp_path / name, course=SHORT)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert {"model.safetensors", "config.json", "train.jsonl"} <= {p.name for p in files}
    assert sum(p.suffix == ".png" for p in files) == 10
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    folder = tmp_path / "one"
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert MaskTokens(str(folder / "codec"))


def test_a_mask_is_the_ink_of_the_digit_that_is_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene, target = draw_mask_scene(rng, "eval")
        assert not scene.separate
        canvas = np.asarray(render(scene, "eval")[0])
        parts = [mask_of(scene, index, canvas) for index in range(len(scene.digits))]
        assert sum(part.astype(int) for part in parts).max() == 1
        assert np.array_equal(sum(parts), canvas[..., 0] > INK)
        columns = [np.flatnonzero(part.any(axis=0)).mean() for part in parts]
        assert columns == sorted(columns)
        assert parts[target].any()


def test_run_lengths_survive_a_round_trip(tmp_path):
    rng = np.random.default_rng(1)
    for share in (0.0, 0.3, 0.9, 1.0):
        mask = rng.random((5, 7)) < share
        runs = run_lengths(mask)
        assert sum(runs["counts"]) == 35
        assert all(count > 0 for count in runs["counts"][1:])
        assert np.array_equal(read_mask(runs, tmp_path), mask)
    assert run_lengths(np.array([[0, 1], [1, 1]], dtype=bool)) == {"size": [2, 2], "counts": [1, 3]}


def test_rows_hold_the_raw_mask_of_their_picture(rows, tmp_path):
    for row in rows:
        canvas = np.asarray(Image.open(locate(f"playground:masks/{row['images'][0]}")))
        truth = read_mask(row["mask"], tmp_path)
        assert truth.shape == WIDE_CANVAS == canvas.shape[:2]
        assert truth.any()
        assert (canvas[..., 0][truth] > INK).all()
        assert re.fullmatch(r"Mask [123]\?", row["prompt"][0]["content"][1]["text"])


def test_more_codes_give_a_better_mask_of_unseen_digits(shipped, rows, tmp_path):
    truths = [read_mask(row["mask"], tmp_path) for row in rows]
    codes = shipped.encode(torch.from_numpy(np.stack(truths))).tolist()

    def mean_iou(count):
        drawn = [(shipped.decode(row[:count]) > 0).numpy() for row in codes]
        return np.mean([iou(*pair) for pair in zip(drawn, truths, strict=True)])

    found = [mean_iou(count) for count in (1, 3, 8)]
    assert found[0] > 0.5
    assert found[1] > found[0] + 0.05
    assert found[2] > found[1] + 0.02
    assert mean_iou(32) >= found[2] - 0.01


def test_demonstrations_have_every_length_and_often_the_wrong_digit(shipped):
    _, processor = extend_model(0)
    batch = Teacher(processor, shipped, LESSON, np.random.default_rng(0)).batch()
    lengths = set()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        trained = processor.tokenizer.decode(ids[labels != IGNORED_LABEL])
        found = re.fullmatch(r"<mask>((?:<m\d+>)+)</mask><\|end\|>", trained)
        assert found
        count = found[1].count("<m")
        assert int((labels != IGNORED_LABEL).sum()) == count + 3
        lengths.add(count)
    assert min(lengths) == 1
    assert max(lengths) == LESSON.most_codes


def test_new_tokens_leave_the_old_model_as_it_was():
    model, processor = extend_model(0)
    old = AutoModelForImageTextToText.from_pretrained(locate("playground:vision/model"))
    before = old.get_input_embeddings().weight
    after = model.get_input_embeddings().weight
    assert len(after) == len(before) + CODEC.num_codes + 2 == len(processor.tokenizer)
    assert torch.equal(after[: len(before)], before)
    ids = processor.tokenizer("<mask><m63></mask>")["input_ids"]
    assert len(ids) == 3
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "<mask><m63></mask>"


def test_what_ships_is_small():
    folder = locate("playground:masks/model").removesuffix("model")
    total = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    assert total < 3_600_000
