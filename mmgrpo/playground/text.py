"""The text playground: two-step arithmetic, reasoned aloud between tags.

A prompt is a calculation such as ``47+38-29=?``. A completion works it out one line per step and
then answers::

    <think>47+38=85
    85-29=56</think><answer>56</answer>

The base model is taught on careless worked solutions: where a step has a carry or a borrow, most
demonstrations forget it and follow the wrong result through. So the model knows how to calculate
but does it unreliably, prompts without a carry are easy and prompts with two are hard, and there is
something for reinforcement learning to sharpen. The format is never spoiled.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .sft import Progress, pad_demonstrations, save_model_folder, supervise, write_jsonl
from .tokenizer import build_tokenizer

NUM_TRAIN = 4096
NUM_EVAL = 256
SFT_STEPS = 800
SFT_BATCH = 64
SFT_LEARNING_RATE = 3e-3
CARELESS_SHARE = 0.65


@dataclass(frozen=True)
class Problem:
    """A calculation of three two-digit numbers; no intermediate result is negative.

    Attributes:
        terms: The three numbers.
        operators: The ``+`` or ``-`` between them.
    """

    terms: tuple[int, int, int]
    operators: tuple[str, str]

    @property
    def prompt(self) -> str:
        """The question as the model sees it."""
        first, second, third = self.terms
        return f"{first}{self.operators[0]}{second}{self.operators[1]}{third}=?"

    @property
    def answer(self) -> str:
        """The correct result."""
        return solve(self)[-1].rpartition("=")[2]


def calculate(left: int, operator: str, right: int, *, careless: bool = False) -> int:
    """Adds or subtracts; carelessly means that every carry or borrow is forgotten.

    Args:
        left: Non-negative number.
        operator: ``+`` or ``-``.
        right: Non-negative number, at most ``left`` for a subtraction.
        careless: Whether to work on each column alone.
    """
    sign = 1 if operator == "+" else -1
    if not careless:
        return left + sign * right
    result, place = 0, 1
    while place <= max(left, right):
        column = left // place % 10 + sign * (right // place % 10)
        is_leading = place * 10 > max(left, right)
        result += (column if is_leading and sign > 0 else column % 10) * place
        place *= 10
    return result


def solve(problem: Problem, slips: tuple[bool, bool] = (False, False)) -> list[str]:
    """Works a problem out, one line per step.

    Args:
        problem: The calculation.
        slips: For each step, whether its carry or borrow is forgotten. A wrong result is used in
            the next step as if it were right.

    Returns:
        Lines such as ``47+38=85``.
    """
    lines, value = [], problem.terms[0]
    for operator, term, slip in zip(problem.operators, problem.terms[1:], slips, strict=True):
        result = calculate(value, operator, term, careless=slip)
        lines.append(f"{value}{operator}{term}={result}")
        value = result
    return lines


def format_completion(lines: list[str]) -> str:
    """Writes worked steps as a tagged completion, without the end-of-sequence token."""
    thought, answer = "\n".join(lines), lines[-1].rpartition("=")[2]
    return f"<think>{thought}</think><answer>{answer}</answer>"


def draw_problem(rng: random.Random) -> Problem:
    """Draws a problem whose careful and careless results all stay non-negative."""
    while True:
        terms = (rng.randint(10, 99), rng.randint(10, 99), rng.randint(10, 99))
        problem = Problem(terms, (rng.choice("+-"), rng.choice("+-")))
        if all(_stays_positive(problem, slip) for slip in (False, True)):
            return problem


def _stays_positive(problem: Problem, slip: bool) -> bool:
    """Whether no step of the problem subtracts more than there is, after a slip in the first."""
    value = problem.terms[0]
    for operator, term in zip(problem.operators, problem.terms[1:], strict=True):
        if operator == "-" and term > value:
            return False
        value = calculate(value, operator, term, careless=slip)
    return True


def draw_demonstration(rng: random.Random, problem: Problem) -> str:
    """Draws a worked solution, each step careless with probability ``CARELESS_SHARE``."""
    slips = (rng.random() < CARELESS_SHARE, rng.random() < CARELESS_SHARE)
    return format_completion(solve(problem, slips))


def draw_splits(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Draws the training and evaluation problems, all different.

    Args:
        seed: Decides both lists.

    Returns:
        ``NUM_TRAIN`` and ``NUM_EVAL`` problems with no prompt in common.
    """
    rng = random.Random(f"text-splits-{seed}")
    problems: dict[Problem, None] = {}
    while len(problems) < NUM_TRAIN + NUM_EVAL:
        problems[draw_problem(rng)] = None
    ordered = list(problems)
    return ordered[NUM_EVAL:], ordered[:NUM_EVAL]


def to_row(problem: Problem) -> dict[str, object]:
    """Makes the data row of a problem: a chat prompt and the answer to check against."""
    return {"prompt": [{"role": "user", "content": problem.prompt}], "answer": problem.answer}


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Makes an untrained three-layer Qwen2 of about 0.6 million parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


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

    def next_batch(step: int) -> dict[str, torch.Tensor]:
        prompts, completions = [], []
        while len(prompts) < SFT_BATCH:
            problem = draw_problem(rng)
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
