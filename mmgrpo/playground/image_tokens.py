"""The image-token task: a language model draws "the number 42" as a grid of codes.

``build_image_tokens`` writes an ordinary ``Qwen2ForCausalLM`` folder of half a million weights,
with a real ``VQModel`` in ``vq/`` and ``image_tokens.json`` beside it, and the prompts. The
vocabulary holds bytes, a few markers and 64 image codes. The model has learned three things:

- ``the number 42`` <begin> 32 codes <end>: to draw;
- ``the number 42`` <plan> ``4 and 2`` <begin> 32 codes <end>: to plan in words first;
- <begin> 32 codes <end> ``number=42``: to answer questions about a picture.

It is half-trained on purpose: part of the pictures and plans it learned from were of other digits
than their prompt said. The answers it learned from were right. The pictures have the format of the
image task, whose classifiers reward and judge them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from mmgrpo.config.image_layout import FILE, ImageLayout
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.image import NUM_NUMBERS, DigitBook, is_held_out, prompt_row
from mmgrpo.playground.sft import (
    Progress,
    pad_demonstrations,
    save_model_folder,
    supervise,
    write_jsonl,
)
from mmgrpo.playground.tiny_vq import GRID, NUM_CODES, encode_codes, train_vq
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.playground.untrained import untrained_decoder

MARKERS = ("<|begin_of_image|>", "<|end_of_image|>", "<|plan|>")
QUESTIONS = ("number", "left", "right")
PLAN_TOKENS = 8


@dataclass(frozen=True)
class Demonstrations:
    """How the base model is trained, and how far.

    Attributes:
        steps: Optimiser steps.
        batch_size: Demonstrations per step.
        learning_rate: Peak of the schedule.
        plan_share: Share of demonstrations that plan first.
        question_share: Share of demonstrations that answer a question; the rest just draws.
        wrong_digit_rate: Probability that a digit is drawn (or planned) from a random class.
        vq_steps: Optimiser steps of the codes.
    """

    steps: int = 900
    batch_size: int = 48
    learning_rate: float = 2e-3
    plan_share: float = 0.25
    question_share: float = 0.3
    wrong_digit_rate: float = 0.2
    vq_steps: int = 600


def answers_of(number: int) -> dict[str, str]:
    """Returns what is to be answered to each of the ``QUESTIONS`` about a picture of a number."""
    text = f"{number:02d}"
    return dict(zip(QUESTIONS, (text, text[0], text[1]), strict=True))


def to_row(number: int) -> dict[str, object]:
    """Makes the data row of a number: that of the image task, and questions with answers."""
    return {**prompt_row(number), "questions": [[*pair] for pair in answers_of(number).items()]}


def build_vocabulary() -> tuple[PreTrainedTokenizerFast, ImageLayout]:
    """Builds the tokenizer, whose last ids are the image codes, and the layout that says so."""
    tokenizer = build_tokenizer()
    codes = [f"<|image_{code}|>" for code in range(NUM_CODES)]
    added = [AddedToken(name, special=True) for name in (*MARKERS, *codes)]
    tokenizer.add_tokens(added, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    begin, end, plan, first = (vocabulary[name] for name in (*MARKERS, codes[0]))
    layout = ImageLayout(
        grid=[*GRID],
        code_offset=first,
        num_codes=NUM_CODES,
        begin_id=begin,
        end_id=end,
        plan_begin_id=plan,
        question_format="{image}{question}=",
    )
    return tokenizer, layout


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Makes an untrained three-layer Qwen2 of about 0.6 million parameters."""
    return untrained_decoder(
        Qwen2ForCausalLM,
        tokenizer,
        seed,
        intermediate_size=320,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


class Teacher:
    """Draws demonstrations.

    Args:
        tokenizer: The vocabulary.
        layout: Where the codes are in it.
        codes_of: Turns numbers ``[B]`` into the codes ``[B, 32]`` of a picture of each.
        settings: Shares and error rates.
        seed: Fixes everything that is drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        layout: ImageLayout,
        codes_of: Any,
        settings: Demonstrations,
        seed: int,
    ) -> None:
        self.tokenizer, self.layout, self.codes_of = tokenizer, layout, codes_of
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> Mapping[str, Tensor]:
        """Draws a batch for :func:`~mmgrpo.playground.sft.supervise`."""
        size, settings = self.settings.batch_size, self.settings
        asked = torch.randint(0, NUM_NUMBERS, (size,), generator=self.generator)
        drawn = self._mistaken(asked)
        pictures = self.codes_of(drawn).tolist()
        kinds = torch.rand(size, generator=self.generator).tolist()
        prompts, completions = [], []
        for number, shown, picture, kind in zip(
            asked.tolist(), drawn.tolist(), pictures, kinds, strict=True
        ):
            image = self._image(picture)
            if kind < settings.question_share:
                prompt, completion = self._answer(image, shown)
            elif kind < settings.question_share + settings.plan_share:
                prompt, completion = self._plan(image, number, shown)
            else:
                prompt = [*self._ids(str(prompt_row(number)["prompt"])), image[0]]
                completion = image[1:]
            prompts.append(prompt)
            completions.append(completion)
        return pad_demonstrations(prompts, completions, self.tokenizer.pad_token_id)

    def _mistaken(self, numbers: Tensor) -> Tensor:
        digits = torch.stack([numbers // 10, numbers % 10])
        wrong = torch.rand(digits.shape, generator=self.generator) < self.settings.wrong_digit_rate
        other = torch.randint(0, 10, digits.shape, generator=self.generator)
        tens, units = torch.where(wrong, other, digits)
        return 10 * tens + units

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _image(self, codes: list[int]) -> list[int]:
        inside = [code + self.layout.code_offset for code in codes]
        return [self.layout.begin_id, *inside, self.layout.end_id]

    def _plan(self, image: list[int], number: int, shown: int) -> tuple[list[int], list[int]]:
        plan_begin = self.layout.plan_begin_id
        assert plan_begin is not None
        tens, units = divmod(shown, 10)
        prompt = [*self._ids(str(prompt_row(number)["prompt"])), plan_begin]
        return prompt, [*self._ids(f"{tens} and {units}"), *image]

    def _answer(self, image: list[int], shown: int) -> tuple[list[int], list[int]]:
        pick = int(torch.randint(0, len(QUESTIONS), (1,), generator=self.generator))
        question, answer = [*answers_of(shown).items()][pick]
        prompt = [*image, *self._ids(f"{question}=")]
        return prompt, [*self._ids(answer), self.tokenizer.eos_token_id]


def build_image_tokens(
    out_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    settings: Demonstrations | None = None,
) -> None:
    """Builds the image-token task: ``model/``, ``train.jsonl`` (80 numbers) and ``eval.jsonl``.

    Args:
        out_dir: The folder to write; made if missing.
        seed: Fixes weights and demonstrations.
        progress: Receives lines of text.
        settings: How far to train; the default takes some minutes.
    """
    settings, out = settings or Demonstrations(), Path(out_dir)
    numbers = range(NUM_NUMBERS)
    write_jsonl(out / "train.jsonl", (to_row(n) for n in numbers if not is_held_out(n)))
    write_jsonl(out / "eval.jsonl", (to_row(n) for n in numbers if is_held_out(n)))
    book, generator = DigitBook(*load_digits("train")), torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        wanted = torch.randint(0, NUM_NUMBERS, (count,), generator=generator)
        return book.draw(wanted, 0.0, generator)

    vq = train_vq(draw, seed=seed, steps=settings.vq_steps)

    def codes_of(wanted: Tensor) -> Tensor:
        return encode_codes(vq, book.draw(wanted, 0.0, generator))

    tokenizer, layout = build_vocabulary()
    model = build_model(tokenizer, seed)
    teacher = Teacher(tokenizer, layout, codes_of, settings, seed)
    supervise(
        model,
        teacher.batch,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        progress=progress,
    )
    save_model_folder(out / "model", model, tokenizer)
    vq.save_pretrained(out / "model" / "vq")
    document = json.dumps(layout.model_dump(), indent=2)
    (out / "model" / FILE).write_text(document + "\n", encoding="utf-8")
