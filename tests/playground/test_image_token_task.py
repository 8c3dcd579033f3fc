"""The image-token task: codes that can be read, demonstrations, and the folder that ships."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from mmgrpo.config.image_layout import FILE
from mmgrpo.config.paths import locate
from mmgrpo.playground.classifier import read_digits
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.image import NUM_NUMBERS, DigitBook, is_held_out
from mmgrpo.playground.image_tokens import (
    Demonstrations,
    Teacher,
    answers_of,
    build_image_tokens,
    build_vocabulary,
)
from mmgrpo.playground.sft import IGNORED_LABEL
from mmgrpo.playground.tiny_vq import GRID, NUM_CODES, encode_codes
from mmgrpo.policies.image_tokens import ImageTokenPolicy

SHORT = Demonstrations(steps=2, batch_size=4, vq_steps=3)


@pytest.fixture(scope="module")
def shipped():
    return ImageTokenPolicy(locate("playground:image_tokens/model"))


def test_a_build_is_complete_and_reproducible(tmp_path):
    for name in ("one", "two"):
        build_image_tokens(tmp_path / name, settings=SHORT)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert {"model.safetensors", FILE, "train.jsonl", "eval.jsonl"} <= {p.name for p in files}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    policy = ImageTokenPolicy(tmp_path / "one" / "model")
    assert policy.layout.grid == [*GRID]
    rows = {
        split: [json.loads(line) for line in (tmp_path / "one" / f"{split}.jsonl").open()]
        for split in ("train", "eval")
    }
    assert [len(rows["train"]), len(rows["eval"])] == [80, 20]
    assert all(is_held_out(int(row["answer"])) for row in rows["eval"])
    row = rows["eval"][3]
    assert row["questions"] == [[q, a] for q, a in answers_of(int(row["answer"])).items()]


def test_what_ships_is_small_and_is_the_layout_of_the_build(shipped):
    parameters = sum(p.numel() for p in shipped.model.parameters())
    parameters += sum(p.numel() for p in shipped.decoder.parameters())
    assert 4e5 < parameters < 7e5
    assert shipped.layout == build_vocabulary()[1]
    assert shipped.model.config.vocab_size == shipped.layout.code_offset + NUM_CODES
    assert type(shipped.model).__name__ == "Qwen2ForCausalLM"
    assert AutoModelForCausalLM.from_pretrained(locate("playground:image_tokens/model"))


@torch.no_grad()
def test_pictures_survive_their_codes(shipped):
    """The judge reads drawn numbers from their codes nearly as well as from their pixels."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, NUM_NUMBERS, (200,), generator=generator)
    canvases = DigitBook(*load_digits("eval")).draw(numbers, 0.0, generator)
    codes = encode_codes(shipped.decoder, canvases)
    assert len(codes.unique()) > NUM_CODES / 2
    judge = AutoModelForImageClassification.from_pretrained(
        locate("playground:image/judge_classifier")
    ).eval()
    pixels = torch.stack(
        [
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            for image in shipped.draw(codes + shipped.layout.code_offset)
        ]
    )
    images = pixels.view(-1, 8, 16, 3).permute(0, 3, 1, 2) / 255.0
    digits = torch.stack([numbers // 10, numbers % 10], dim=1)
    right = (read_digits(judge, images).argmax(-1) == digits).all(1).float().mean()
    assert right > 0.8


def test_demonstrations_are_what_the_policy_is_asked_for():
    tokenizer, layout = build_vocabulary()
    codes = torch.arange(32) % NUM_CODES
    settings = Demonstrations(batch_size=64, wrong_digit_rate=0.0)
    teacher = Teacher(tokenizer, layout, lambda n: codes.expand(len(n), -1), settings, seed=0)
    batch = teacher.batch()
    image = [layout.begin_id, *(codes + layout.code_offset).tolist(), layout.end_id]
    seen = set()
    for row, labels, on in zip(
        batch["input_ids"], batch["labels"].tolist(), batch["attention_mask"], strict=True
    ):
        ids = row[on.bool()].tolist()
        trained = [i for i, label in zip(ids, labels, strict=False) if label != IGNORED_LABEL]
        prompt = ids[: len(ids) - len(trained)]
        start = ids.index(layout.begin_id)
        assert ids[start : start + 34] == image
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if prompt[-1] == layout.begin_id:
            seen.add("draw")
            assert trained == image[1:]
            assert text.startswith("the number ")
        elif prompt[-1] == layout.plan_begin_id:
            seen.add("plan")
            number = text.removeprefix("the number ")[:2]
            assert text == f"the number {number}{number[0]} and {number[1]}"
        else:
            seen.add("answer")
            assert prompt[:34] == image
            question, answer = text.split("=")
            assert question in answers_of(0)
            assert trained == tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    assert seen == {"draw", "plan", "answer"}
