"""The shipped prompt sets: what the rewards read is what the prompts say."""

import json
import re
from pathlib import Path

import pytest

from mmgrpo.config.paths import locate
from mmgrpo.playground.prompts import OBJECTS, SETS, SIZES, build_prompts
from mmgrpo.rewards.image_geneval import GENEVAL_COLOURS
from mmgrpo.rewards.image_ocr import quoted
from mmgrpo.rewards.scene_rules import read_specification


def rows(folder, name, part):
    text = (folder / f"{name}.{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "prompts"
    build_prompts(folder)
    return folder


@pytest.mark.parametrize("name", SETS)
def test_train_and_eval_share_no_prompt(built, name):
    train, held_out = (rows(built, name, part) for part in ("train", "eval"))
    assert [len(train), len(held_out)] == [SIZES["train"], SIZES["eval"]]
    prompts = [row["prompt"] for row in train + held_out]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", SETS)
def test_what_ships_is_what_is_built(built, name):
    for part in SIZES:
        shipped = Path(locate(f"playground:prompts/{name}.{part}.jsonl"))
        assert shipped.read_bytes() == (built / f"{name}.{part}.jsonl").read_bytes()


def test_the_text_to_write_is_quoted(built):
    for row in rows(built, "ocr", "train"):
        assert quoted(row["prompt"]) == row["text"]


def test_every_object_asked_for_is_in_the_prompt(built):
    kinds = set()
    for row in rows(built, "geneval", "train"):
        wanted = read_specification(row["include"], row["exclude"] or (), OBJECTS, GENEVAL_COLOURS)
        kinds.add(row["tag"])
        for entry in wanted.include:
            assert re.search(rf"\b{entry.name}(e?s)?\b", row["prompt"])
            assert entry.colour is None or f"{entry.colour} {entry.name}" in row["prompt"]
            if entry.relation is not None:
                first = wanted.include[entry.other].name
                assert re.search(rf"{entry.name} {entry.relation} an? {first}", row["prompt"])
        counting = [entry.count for entry in wanted.include if entry.count > 1]
        assert bool(counting) == (row["tag"] == "counting")
    assert len(kinds) == 6


def test_what_may_be_asked_about_a_picture_is_answered_by_its_prompt(built):
    """One question, or one for each of two things; an answer is of the prompt, and not given away.

    A place is one of the four that the question lists.
    """
    for row in rows(built, "geneval", "train"):
        two = row["tag"] in ("two_object", "color_attr")
        assert len(row["questions"]) == 1 + two
        for question, answer in row["questions"]:
            assert re.search(rf"\b{answer}\b", row["prompt"])
            oranges = question == f"What colour is the {answer}?"
            assert (answer in question) == (row["tag"] == "position" or oranges)
            names = [entry["class"] for entry in row["include"]]
            assert any(name in question for name in names) != (row["tag"] == "single_object")
