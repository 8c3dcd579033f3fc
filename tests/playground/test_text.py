"""The text playground: sums that can be checked, tags that survive, a folder that loads."""

import itertools
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmgrpo.playground.sft import IGNORED_LABEL, pad_demonstrations
from mmgrpo.playground.text import (
    NUM_EVAL,
    NUM_TRAIN,
    Sum,
    add_columns,
    build_text,
    draw_demonstration,
    draw_splits,
    draw_sum,
    format_completion,
    train_model,
)
from mmgrpo.playground.tokenizer import TAG_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    build_text(path, steps=2)
    return path


@pytest.fixture(scope="module")
def rows(folder):
    read = lambda name: [json.loads(line) for line in (folder / name).open()]  # noqa: E731
    return {"train": read("train.jsonl"), "eval": read("eval.jsonl")}


def test_answers_are_the_sums(rows):
    for row in rows["train"] + rows["eval"]:
        (message,) = row["prompt"]
        left, right = message["content"].removesuffix("=?").split("+")
        assert int(row["answer"]) == int(left) + int(right)


def test_splits_share_no_prompt(rows):
    prompts = {name: [row["prompt"][0]["content"] for row in rows[name]] for name in rows}
    assert len(set(prompts["train"])) == len(prompts["train"]) == NUM_TRAIN
    assert len(set(prompts["eval"])) == len(prompts["eval"]) == NUM_EVAL
    assert not set(prompts["train"]) & set(prompts["eval"])


def test_another_seed_gives_other_splits():
    assert draw_splits(0) == draw_splits(0)
    assert draw_splits(0) != draw_splits(1)


def test_careful_columns_add_up():
    rng = random.Random(3)
    for problem in (draw_sum(rng) for _ in range(300)):
        lines, answer = add_columns(problem)
        assert answer == problem.answer
        for line in lines:
            terms, total = line.split("=")
            assert sum(map(int, terms.split("+"))) == int(total)


def test_forgotten_carries_are_followed_through():
    assert add_columns(Sum(347, 285), (True, True, True)) == (["7+5=12", "4+8=12", "3+2=5"], "522")
    assert add_columns(Sum(347, 285), (True,)) == (["7+5=12", "4+8=12", "3+2+1=6"], "622")
    assert add_columns(Sum(999, 999), ()) == (["9+9=18", "9+9+1=19", "9+9+1=19"], "1998")


def test_a_sum_without_carries_is_never_spoiled():
    for forgets in itertools.product((False, True), repeat=3):
        assert add_columns(Sum(123, 456), forgets)[1] == "579"


def test_demonstrations_keep_the_format_and_are_often_wrong():
    rng = random.Random(0)
    right = 0
    for problem in (draw_sum(rng) for _ in range(500)):
        completion = draw_demonstration(rng, problem)
        allowed = itertools.product((False, True), repeat=len(str(problem.left)))
        assert completion in {format_completion(*add_columns(problem, f)) for f in allowed}
        right += completion.endswith(f"<answer>{problem.answer}</answer>")
    assert 0.35 < right / 500 < 0.65


@pytest.mark.parametrize(
    "text", ["<think>7+5=12\n4+8+1=13</think><answer>632</answer>", "naïve 数字 \t🙂", " a  b "]
)
def test_tokenizer_round_trip(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tags_are_single_tokens_that_stay_visible():
    tokenizer = build_tokenizer()
    for tag in TAG_TOKENS:
        assert len(tokenizer(tag)["input_ids"]) == 1
    ids = tokenizer("<answer>12</answer><|end|>")["input_ids"]
    assert len(ids) == 5
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>12</answer>"


def test_chat_template_renders_every_role():
    tokenizer = build_tokenizer()
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": [{"type": "text", "text": "1+1=?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2=?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|system|>Add.<|user|>1+1=?<|assistant|>2<|end|><|user|>2+2=?<|assistant|>"
    assert rendered == expected


def test_only_completions_are_supervised():
    batch = pad_demonstrations([[1, 2], [3]], [[4, 9], [5, 6, 7, 9]], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 9, 0], [3, 5, 6, 7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    skip = IGNORED_LABEL
    assert batch["labels"].tolist() == [[skip, skip, 4, 9, skip], [skip, 5, 6, 7, 9]]


def test_folder_loads_and_generates_for_chat_and_string_prompts(folder, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    chat = tokenizer.apply_chat_template(
        rows["eval"][0]["prompt"], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer([chat, "12+34=?"], return_tensors="pt", padding=True)
    assert inputs["attention_mask"][1, 0] == 0, "padding goes to the left"
    out = model.generate(**inputs, max_new_tokens=3)
    assert out.shape[0] == 2
    settings = model.generation_config
    assert settings.eos_token_id == tokenizer.eos_token_id
    assert (settings.temperature, settings.top_k, settings.top_p) == (1.0, 0, 1.0)
    assert sum(file.stat().st_size for file in (folder / "model").iterdir()) < 3_000_000


def test_supervised_training_is_reproducible():
    first, again, other = (train_model(seed, steps=5)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
