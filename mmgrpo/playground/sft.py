"""Tiny supervised trainer shared by the playground's base models.

A base model of the playground is made the ordinary way: next-token prediction on demonstrations,
with the prompt masked out. Everything random flows from one seed, so a build can be repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mmgrpo.errors import UsageError

IGNORED_LABEL = -100

Progress = Callable[[str], None]
Batch = Mapping[str, Tensor]


def pad_demonstrations(
    prompts: list[list[int]], completions: list[list[int]], pad_id: int
) -> dict[str, Tensor]:
    """Joins prompts and completions into one right-padded batch that trains on completions only.

    Args:
        prompts: Token ids of each prompt.
        completions: Token ids of each completion, end-of-sequence token included.
        pad_id: Token id that fills the short rows.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[B, L]``; labels are
        ``IGNORED_LABEL`` on prompts and padding.
    """
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.long)
    for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
        tokens = torch.tensor(ids)
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        labels[row, len(prompt) : len(ids)] = tokens[len(prompt) :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Returns the learning-rate factor at ``step``: linear rise, then a cosine fall to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Makes Muon for the weight matrices of the blocks and AdamW for everything else.

    On models this small Muon learns arithmetic in about half the steps of AdamW, which is what
    keeps a build on a laptop around a minute.

    Args:
        model: The model to train; embeddings are recognised by their module type.
        learning_rate: Peak rate of both optimisers, on the scale of AdamW.

    Raises:
        UsageError: this torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(
            "`mmgrpo build` needs torch 2.9 or newer for its optimiser; this is "
            f"{torch.__version__}. (The built playground ships with the package.)"
        )
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in parameters if p.ndim != 2 or id(p) in embeddings]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def supervise(
    model: nn.Module,
    next_batch: Callable[[], Batch],
    *,
    steps: int,
    learning_rate: float,
    max_grad_norm: float = 1.0,
    progress: Progress | None = None,
) -> float:
    """Trains ``model`` in place by next-token prediction.

    Args:
        model: A Hugging Face model whose forward takes ``labels`` and returns ``.loss``.
        next_batch: Gives the keyword arguments of the next forward pass.
        steps: Number of optimiser steps.
        learning_rate: Peak of the warm-up and cosine schedule.
        max_grad_norm: The gradient is clipped to this norm.
        progress: Receives a line of text every hundred steps.

    Returns:
        The loss of the last step.
    """
    optimizers = make_optimizers(model, learning_rate)
    warmup = max(1, min(100, steps // 10))
    loss = torch.zeros(())
    model.train()
    for step in range(steps):
        loss = model(**next_batch()).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warmup_cosine(step, steps, warmup)
            optimizer.step()
        if progress is not None and (step + 1) % 100 == 0:
            progress(f"supervised step {step + 1}/{steps}, loss {loss.item():.4f}")
    model.eval()
    return float(loss.detach())


def plain_sampling(tokenizer: Any) -> GenerationConfig:
    """Makes the generation settings of a base model: sample from the model's own distribution.

    Everything is spelled out, because ``generate`` falls back to ``top_k=50`` where a folder is
    silent, and samples drawn so do not follow the log-probabilities that training uses.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_model_folder(folder: Path, model: Any, processor: Any) -> None:
    """Writes a Hugging Face folder: weights, configuration, and tokenizer or processor.

    Args:
        folder: Created if missing.
        model: A Transformers model.
        processor: A Transformers tokenizer or processor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
