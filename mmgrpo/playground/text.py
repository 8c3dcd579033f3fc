"""The text playground: column addition, reasoned aloud between tags.

A prompt is a sum such as ``347+285=?``. A completion adds one column per line, from the right, and
then puts the answer together::

    <think>7+5=12
    4+8+1=13
    3+2+1=6</think><answer>632</answer>

The base model is taught by careless demonstrations: after a column of ten or more, most of them
forget to carry the one and follow the mistake through. So the model can add, but unreliably; sums
without a carry are easy, sums with two are hard, and there is something for reinforcement
learning to sharpen. The format is never spoiled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from mmgrpo.playground.sft import (
    Progress,
    pad_demonstrations,
    save_model_folder,
    supervise,
    write_jsonl,
)
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.playground.untrained import untrained_decoder

NUM_TRAIN = 4096
NUM_EVAL = 256
THREE_DIGIT_SHARE = 0.7
CARELESS_SHARE = 0.68
SFT_STEPS = 750
SFT_BATCH = 32
SFT_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Sum:
    """An addition of two numbers with the same number of digits.

    Attributes:
        left: First number.
        right: Second number.
    """

    left: int
    right: int

    @property
    def prompt(self) -> str:
        """The question as the model sees it."""
        return f"{self.left}+{self.right}=?"

    @property
    def answer(self) -> str:
        """The correct result."""
        return str(self.left + self.right)


def add_columns(problem: Sum, forgets: Sequence[bool] = ()) -> tuple[list[str], str]:
    """Adds column by column from the right.

    Args:
        problem: The sum to work out.
        forgets: For each column, whether a one carried out of it is forgotten. Columns beyond the
            end are careful.

    Returns:
        Lines such as ``4+8+1=13``, and the answer that follows from them.
    """
    lines, digits, carry = [], "", 0
    columns = list(zip(str(problem.left)[::-1], str(problem.right)[::-1], strict=True))
    for index, (upper, lower) in enumerate(columns):
        total = int(upper) + int(lower) + carry
        lines.append(f"{upper}+{lower}{'+1' if carry else ''}={total}")
        is_last = index == len(columns) - 1
        digits = (str(total) if is_last else str(total % 10)) + digits
        carry = 0 if index < len(forgets) and forgets[index] else total // 10
    return lines, digits


def format_completion(lines: list[str], answer: str) -> str:
    """Writes worked columns as a tagged completion, without the end-of-sequence token."""
    thought = "\n".join(lines)
    return f"<think>{thought}</think><answer>{answer}</answer>"


def draw_sum(rng: random.Random) -> Sum:
    """Draws a sum of two three-digit or two two-digit numbers."""
    low = 100 if rng.random() < THREE_DIGIT_SHARE else 10
    return Sum(rng.randint(low, 10 * low - 1), rng.randint(low, 10 * low - 1))


def draw_demonstration(rng: random.Random, problem: Sum) -> str:
    """Draws a worked solution that forgets each carry with probability ``CARELESS_SHARE``."""
    forgets = [rng.random() < CARELESS_SHARE for _ in str(problem.left)]
    return format_completion(*add_columns(problem, forgets))


def draw_splits(seed: int) -> tuple[list[Sum], list[Sum]]:
    """Draws the training and evaluation problems, all different.

    Args:
        seed: Decides both lists.

    Returns:
        ``NUM_TRAIN`` and ``NUM_EVAL`` problems with no prompt in common.
    """
    rng = random.Random(f"text-splits-{seed}")
    problems: dict[Sum, None] = {}
    while len(problems) < NUM_TRAIN + NUM_EVAL:
        problems[draw_sum(rng)] = None
    ordered = list(problems)
    return ordered[NUM_EVAL:], ordered[:NUM_EVAL]


def to_row(problem: Sum) -> dict[str, object]:
    """Makes the data row of a problem: a chat prompt and the answer to check against."""
    return {"prompt": [{"role": "user", "content": problem.prompt}], "answer": problem.answer}


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Makes an untrained three-layer Qwen2 of about 0.6 million parameters."""
    return untrained_decoder(
        Qwen2ForCausalLM,
        tokenizer,
        seed,
        intermediate_size=384,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )


def train_model(
    seed: int, *, steps: int = SFT_STEPS, progress: Progress | None = None
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Makes the half-trained base model.

    Half of the demonstrations render the prompt through the chat template and half as the bare
    string, so both kinds of prompt work. Evaluation problems are never shown.

    Args:
        seed: Decides weights and demonstrations.
        steps: Supervised steps.
        progress: Receives lines of text.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    held_out = set(draw_splits(seed)[1])
    rng = random.Random(f"text-sft-{seed}")

    def next_batch() -> dict[str, torch.Tensor]:
        prompts: list[str] = []
        completions: list[str] = []
        while len(prompts) < SFT_BATCH:
            problem = draw_sum(rng)
            if problem in held_out:
                continue
            chat = f"<|user|>{problem.prompt}<|assistant|>"
            prompts.append(chat if len(prompts) % 2 else problem.prompt)
            completions.append(draw_demonstration(rng, problem) + tokenizer.eos_token)
        return pad_demonstrations(
            tokenizer(prompts)["input_ids"],
            tokenizer(completions)["input_ids"],
            tokenizer.pad_token_id,
        )

    supervise(model, next_batch, steps=steps, learning_rate=SFT_LEARNING_RATE, progress=progress)
    return model, tokenizer


def build_text(
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int = SFT_STEPS,
    progress: Progress | None = None,
) -> None:
    """Builds the text playground: ``model/``, ``train.jsonl`` and ``eval.jsonl``.

    Args:
        out_dir: Created if missing.
        seed: Decides data and weights.
        steps: Supervised steps of the base model.
        progress: Receives lines of text.
    """
    folder = Path(out_dir)
    train, held_out = draw_splits(seed)
    write_jsonl(folder / "train.jsonl", map(to_row, train))
    write_jsonl(folder / "eval.jsonl", map(to_row, held_out))
    model, tokenizer = train_model(seed, steps=steps, progress=progress)
    save_model_folder(folder / "model", model, tokenizer)
