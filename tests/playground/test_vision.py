"""The vision playground: scenes that can be checked, placeholders that fit, a folder that loads."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmgrpo.playground import vision
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.scenes import (
    DIGIT_SIZE,
    SMALL_CANVAS,
    WIDE_CANVAS,
    draw_scene,
    enlarge,
    render,
)

CHECKS = {"sum": sum, "largest": max}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "NUM_TRAIN", 60)
        patch.setattr(vision, "NUM_EVAL", 40)
        vision.build_vision(path, steps=2, recite_steps=2)
    return path


@pytest.fixture(scope="module")
def rows(folder):
    read = lambda name: [json.loads(line) for line in (folder / name).open()]  # noqa: E731
    return {"train": read("train.jsonl"), "eval": read("eval.jsonl")}


def test_digit_splits_are_disjoint_and_cover_everything():
    names = ("train", "judge", "eval")
    pictures = {name: {p.tobytes() for p in load_digits(name)[0]} for name in names}
    assert not pictures["train"] & pictures["judge"]
    assert not pictures["train"] & pictures["eval"]
    assert not pictures["judge"] & pictures["eval"]
    assert sum(len(load_digits(name)[1]) for name in names) == 1797
    images, labels = load_digits("eval")
    assert images.shape == (len(labels), 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 255


def test_unknown_split_says_which_exist():
    with pytest.raises(ValueError, match="choose one of train, judge, eval"):
        load_digits("test")


def test_answers_follow_from_the_digits(rows):
    for row in rows["train"] + rows["eval"]:
        digits = row["digits"]
        if row["task"] == "sort":
            assert row["answer"] == "".join(str(d) for d in sorted(digits))
        else:
            assert row["answer"] == str(CHECKS[row["task"]](digits))
    assert {row["task"] for row in rows["eval"]} == {"sum", "largest", "sort"}


def test_rows_show_one_or_several_images(folder, rows):
    counts = set()
    for row in rows["train"] + rows["eval"]:
        parts = row["prompt"][0]["content"]
        assert [part["type"] for part in parts] == ["image"] * len(row["images"]) + ["text"]
        assert all((folder / path).is_file() for path in row["images"])
        assert len(row["images"]) in (1, len(row["digits"]))
        counts.add(len(row["images"]))
    assert counts == {1, 2, 3}


def test_digits_do_not_overlap_and_are_drawn_where_the_scene_says():
    rng = np.random.default_rng(5)
    pictures, labels = load_digits("eval")
    for scene in (draw_scene(rng, "eval") for _ in range(200)):
        assert [int(labels[p]) for p in scene.pictures] == list(scene.digits)
        images = [np.asarray(image)[..., 0] for image in render(scene, "eval")]
        columns = [column for _, column in scene.places]
        if not scene.separate:
            assert all(b - a >= DIGIT_SIZE for a, b in itertools.pairwise(columns))
        for index, (row, column) in enumerate(scene.places):
            canvas = images[index if scene.separate else 0]
            window = canvas[row : row + DIGIT_SIZE, column : column + DIGIT_SIZE]
            assert np.array_equal(window, enlarge(pictures[scene.pictures[index]]))


def test_completions_are_right_when_careful():
    scenes = [draw_scene(np.random.default_rng(i), "train") for i in range(200)]
    for scene in scenes:
        digits = "".join(map(str, scene.digits))
        assert scene.completion() == f"<think>{digits}</think><answer>{scene.answer}</answer>"
    slips = [scene.completion(careless=True) != scene.completion() for scene in scenes]
    assert 0.5 < np.mean(slips) < 0.9


def test_placeholders_match_the_image_grids(folder, rows):
    processor = AutoProcessor.from_pretrained(folder / "model")
    chosen = rows["train"][:16]
    texts = [
        processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in chosen
    ]
    images = [[Image.open(folder / path) for path in row["images"]] for row in chosen]
    flat = [image for group in images for image in group]
    inputs = processor(text=texts, images=flat, return_tensors="pt", padding=True)
    per_image = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    expected = {height * width // 64 for height, width in (SMALL_CANVAS, WIDE_CANVAS)}
    assert set(per_image) == expected == {9, 21}
    is_image = inputs["input_ids"] == processor.image_token_id
    assert torch.equal(is_image, inputs["mm_token_type_ids"] == 1)
    for row, count in zip(chosen, is_image.sum(1).tolist(), strict=True):
        shown = [per_image.pop(0) for _ in row["images"]]
        assert count == sum(shown)
    assert inputs["pixel_values"].shape[0] == 4 * int(is_image.sum())


def test_folder_loads_and_generates(folder, rows):
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    row = next(row for row in rows["eval"] if len(row["images"]) > 1)
    text = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    images = [Image.open(folder / path) for path in row["images"]]
    inputs = processor(text=[text], images=images, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 3
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert sum(file.stat().st_size for file in (folder / "model").iterdir()) < 3_000_000


def test_recitations_supervise_the_answer_and_not_the_reading():
    processor = vision.build_processor()
    batch = vision.encode_recitations(processor, np.random.default_rng(0), 8)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert "<think>" in processor.tokenizer.decode(ids[labels == -100])
        assert processor.tokenizer.decode(ids[labels != -100]).startswith("</think><answer>")


def test_supervision_covers_exactly_the_completions():
    processor = vision.build_processor()
    batch = vision.encode_demonstrations(processor, np.random.default_rng(0), 8)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        supervised = processor.tokenizer.decode(ids[labels != -100])
        assert supervised.startswith("<think>")
        assert supervised.endswith("</answer><|end|>")


def test_supervised_training_is_reproducible():
    first, again = (
        vision.train_model(0, steps=3, recite_steps=2)[0].state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
