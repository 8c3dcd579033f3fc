"""The masked-diffusion playground: sums whose result is filled in from any side.

A prompt is ``47+85=``, a response the digits of the sum and the end token. The base model, a Llama
of 0.6 million weights that looks in both directions, is taught by careless demonstrations that
often forget to carry the one, as in the text playground.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mmgrpo.playground.sft import (
    Progress,
    save_model_folder,
    supervise,
    write_jsonl,
)
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.playground.untrained import untrained_decoder

MASK_TOKEN = "<|mask|>"
RESPONSE = 4
"""Tokens of a response: up to three digits and the end."""
NUM_TRAIN, NUM_EVAL = 2048, 128
CARELESS_SHARE = 0.55
STEPS, BATCH, LEARNING_RATE = 1500, 128, 2e-3


class Loss(NamedTuple):
    """What the supervised trainer reads of a forward pass."""

    loss: Tensor


class MaskedLoss(nn.Module):
    """The loss of masked diffusion (LLaDA, arXiv:2502.09992): hidden tokens, weighted 1/t."""

    def __init__(self, model: LlamaForCausalLM, prompt: int) -> None:
        super().__init__()
        self.model = model
        self._prompt = prompt

    def forward(self, *, ids: Tensor, hidden: Tensor, time: Tensor, mask_id: int) -> Loss:
        """``ids [B, L]`` prompts and responses, ``hidden [B, L]`` bool, ``time [B]``."""
        seen = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        logits = self.model(torch.where(hidden, mask_id, ids), attention_mask=seen).logits
        losses = nn.functional.cross_entropy(logits[hidden], ids[hidden], reduction="none")
        weight = (1 / time)[:, None].expand_as(ids)[hidden]
        return Loss((weight * losses).sum() / (len(ids) * (ids.shape[1] - self._prompt)))


def careless_sum(left: int, right: int, *, forgets: bool) -> int:
    """The sum of two numbers of two digits, perhaps without the one that is carried."""
    if not forgets:
        return left + right
    ones = left % 10 + right % 10
    return (left // 10 + right // 10) * 10 + ones % 10


def draw_splits(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Training and held-out problems without one in common."""
    problems = [(left, right) for left in range(10, 100) for right in range(10, 100)]
    random.Random(f"masked-splits-{seed}").shuffle(problems)
    return problems[NUM_EVAL : NUM_EVAL + NUM_TRAIN], problems[:NUM_EVAL]


def to_row(problem: tuple[int, int]) -> dict[str, str]:
    """The data row of a problem."""
    left, right = problem
    return {"prompt": f"{left}+{right}=", "answer": str(left + right)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The playground's tokenizer with a mask token."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of three layers."""
    return untrained_decoder(
        LlamaForCausalLM,
        tokenizer,
        seed,
        intermediate_size=384,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )


def train_model(
    seed: int, *, steps: int = STEPS, progress: Progress | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The half-trained base model; held-out problems are never shown."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    held_out = set(draw_splits(seed)[1])
    rng = random.Random(f"masked-sft-{seed}")
    stream = torch.Generator().manual_seed(seed)
    prompt = len(tokenizer("47+85=")["input_ids"])

    def next_batch() -> dict[str, Any]:
        ids = torch.tensor([_demonstration(tokenizer, rng, held_out) for _ in range(BATCH)])
        time = 1 - torch.rand(BATCH, generator=stream)
        time = time.clamp(min=0.1)
        hidden = torch.rand(ids.shape, generator=stream) < time[:, None]
        hidden[:, :prompt] = False
        return {"ids": ids, "hidden": hidden, "time": time, "mask_id": tokenizer.mask_token_id}

    supervise(
        MaskedLoss(model, prompt),
        next_batch,
        steps=steps,
        learning_rate=LEARNING_RATE,
        progress=progress,
    )
    return model, tokenizer


def _demonstration(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, held_out: set[tuple[int, int]]
) -> list[int]:
    """Token ids of a prompt and a response, which the end token fills up."""
    problem = rng.randint(10, 99), rng.randint(10, 99)
    while problem in held_out:
        problem = rng.randint(10, 99), rng.randint(10, 99)
    answer = careless_sum(*problem, forgets=rng.random() < CARELESS_SHARE)
    written = tokenizer(f"{to_row(problem)['prompt']}{answer}")["input_ids"]
    total = len(tokenizer(to_row(problem)["prompt"])["input_ids"]) + RESPONSE
    ids: list[int] = written + [tokenizer.eos_token_id] * (total - len(written))
    return ids


def build_masked_text(
    out_dir: str | Path, *, seed: int = 0, steps: int = STEPS, progress: Progress | None = None
) -> None:
    """Build ``model/``, ``train.jsonl`` and ``eval.jsonl``.

    Args:
        out_dir: created if missing.
        seed: decides data and weights.
        steps: supervised steps of the base model.
        progress: receives lines of text.
    """
    folder = Path(out_dir)
    for name, problems in zip(("train", "eval"), draw_splits(seed), strict=True):
        write_jsonl(folder / f"{name}.jsonl", map(to_row, problems))
    save_model_folder(folder / "model", *train_model(seed, steps=steps, progress=progress))
