"""What a backward pass has to remember, and whether that fits into the memory.

Estimates for dense transformers with fused attention, good to a factor of two. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmgrpo.config.layer_shape import LayerShape

SHARE = 0.8
"""Part of the available memory that may be planned for: an estimate errs, allocators waste."""
ADAM_BYTES = 8
"""Two float32 moments of a trained weight."""
SOFTMAX_BYTES = 16
"""Of one logit: itself, its float32 copy, the log-softmax and a gradient."""


@dataclass(frozen=True)
class MicroBatch:
    """The largest piece of an update that goes through the network at once.

    Attributes:
        rows: samples.
        decisions: tokens of their completions, padding included.
        prompts: different prompts among them.
        prompt_tokens: tokens of the longest prompt.
    """

    rows: int
    decisions: int
    prompts: int
    prompt_tokens: int


@dataclass(frozen=True)
class Checkpointing:
    """Whether activations are computed again in the backward pass, and why, as a clause."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'}: {self.reason}"


def kept_values(shape: LayerShape) -> int:
    """Numbers that a layer keeps of each token for its backward pass.

    Two norms keep their input, the normalised input and the result; attention keeps queries, keys,
    values and its result, which the output projection keeps again; a gated MLP keeps both branches,
    the activation and the product.
    """
    return 6 * shape.hidden + 3 * shape.queries + 2 * shape.keys + 4 * shape.inner


def activation_bytes(
    shape: LayerShape,
    batch: MicroBatch,
    *,
    logits: int,
    element: int,
    shares_prompts: bool = True,
    packed: bool = False,
    checkpointing: bool = False,
) -> int:
    """Peak of a forward and backward pass, beside weights and their gradients.

    Args:
        shape: the model.
        batch: what goes through it.
        logits: numbers that the output head holds at the same time.
        element: bytes of a number in the layers; the softmax is float32 always.
        shares_prompts: a prompt is read once for its group.
        packed: prompts and completions are one row. Otherwise a shared prompt's keys and values are
            laid out for every sample, and with checkpointing no prompt is shared.
        checkpointing: keep what goes into each layer, and compute the rest of one layer at a time.
    """
    laid_out = shares_prompts and not packed and not checkpointing
    shares = shares_prompts and (packed or laid_out)
    tokens = batch.decisions + (batch.prompts if shares else batch.rows) * batch.prompt_tokens
    copies = batch.rows * batch.prompt_tokens if laid_out else 0
    layer = tokens * kept_values(shape) + copies * 2 * shape.queries
    kept = shape.layers * (tokens * shape.hidden if checkpointing else layer)
    if checkpointing:
        kept += layer
    return kept * element + SOFTMAX_BYTES * logits


def training_bytes(trained: int, element: int) -> int:
    """Gradients, AdamW's moments, and float32 masters of weights with less precision."""
    return trained * (element + ADAM_BYTES + (4 if element < 4 else 0))


def choose_checkpointing(
    shape: LayerShape,
    batch: MicroBatch,
    *,
    logits: int,
    element: int,
    shares_prompts: bool,
    packed: bool = False,
    beside: int,
    available: int,
) -> Checkpointing:
    """Decide for checkpointing where a micro-batch would not fit without it.

    Args:
        shape: the model.
        batch: the largest micro-batch.
        logits: see :func:`activation_bytes`.
        element: see :func:`activation_bytes`.
        shares_prompts: see :func:`activation_bytes`.
        packed: see :func:`activation_bytes`.
        beside: what else will be needed of the available memory.
        available: memory of the device that nothing takes yet.
    """
    plain, again = (
        activation_bytes(
            shape,
            batch,
            logits=logits,
            element=element,
            shares_prompts=shares_prompts,
            packed=packed,
            checkpointing=twice,
        )
        for twice in (False, True)
    )
    room = int(SHARE * available) - beside
    what = f"{batch.rows} samples with prompts of {batch.prompt_tokens:,} tokens"
    free = f"{_size(available)} are free, weights and optimiser will take {_size(beside)}"
    if plain <= room:
        return Checkpointing(False, f"{what} need about {_size(plain)}; {free}")
    if again >= plain:
        return Checkpointing(
            False,
            f"{what} need about {_size(plain)}, and checkpointing would not help; {free}; "
            "lower trainer.micro_batch_size",
        )
    reason = f"{what} would need about {_size(plain)}, and so {_size(again)}; {free}"
    if again > room:
        reason += "; even that may not fit: lower trainer.micro_batch_size"
    return Checkpointing(True, reason)


def _free_on_cuda(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])


def _free_on_cpu(device: torch.device) -> int:
    import psutil

    del device
    return int(psutil.virtual_memory().available)


_FREE: dict[str, Callable[[torch.device], int]] = {"cuda": _free_on_cuda, "cpu": _free_on_cpu}


def available_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory that are free; None where it cannot be asked."""
    ask = _FREE.get(device.type)
    return None if ask is None else ask(device)


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:,.1f} {name}"
