"""The layers of a language model of transformers, made to attend within a packed row.

Shapes: S tokens of a row, H heads of queries, K heads of keys, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from mmgrpo.policies.packed_kernels import Kernel
from mmgrpo.policies.packing import Layout

NAME = "mmgrpo_packed"
"""What transformers knows this attention by."""
HARMLESS = {"position_ids", "cache_position", "mm_token_type_ids"}
"""What layers may tell an attention without changing it."""
BOTH_WAYS = {"token_type_ids", "mm_token_type_ids"}
"""Inputs by which models with images let some tokens look ahead, unless they are for positions."""


def can_pack(model: Any) -> bool:
    """Whether nothing that a short text would not show keeps a model from reading packed rows.

    Args:
        model: a causal language model of transformers.
    """
    config, accepted = model.config.get_text_config(), inspect.signature(model.forward).parameters
    return (
        attends_to_all(config)
        and getattr(config, "is_causal", True)
        and not getattr(config, "use_bidirectional_attention", None)
        and not getattr(config, "attn_logit_softcapping", None)
        and "position_ids" in accepted
        and (
            config is model.config
            or hasattr(model.base_model, "get_rope_index")
            or not BOTH_WAYS & set(accepted)
        )
    )


def attends_to_all(config: Any) -> bool:
    """Whether every layer of a text model attends to all tokens before."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if _has_window(config) else None
    return kinds == {"full_attention"} and window is None


def _has_window(config: Any) -> bool:
    return bool(getattr(config, "use_sliding_window", True))


@dataclass
class _Reading:
    """One network call on a packed row."""

    config: Any
    layout: Layout
    kernel: Kernel
    calls: int = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        before, token = self.config._attn_implementation, _READING.set(self)  # noqa: SLF001
        self.config._attn_implementation = {"": NAME}  # noqa: SLF001 - not of nested configurations
        try:
            yield
        finally:
            self.config._attn_implementation = {"": before}  # noqa: SLF001
            _READING.reset(token)


_READING: ContextVar[_Reading | None] = ContextVar("packed row that is read", default=None)


@contextmanager
def attend_within(layout: Layout, model: Any, kernel: Kernel) -> Iterator[None]:
    """Within the context, the layers of a model attend by a layout; other models are as they were.

    Args:
        layout: the sequences of the row that the model is called with.
        model: a causal language model of transformers.
        kernel: computes the attention.

    Raises:
        RuntimeError: at the end, if a layer did not.
    """
    _register()
    reading = _Reading(model.get_decoder().config, layout, kernel)
    with reading.active():
        yield
    if reading.calls != reading.config.num_hidden_layers:
        raise RuntimeError(
            f"{reading.calls} of {reading.config.num_hidden_layers} layers let their attention be "
            "replaced"
        )


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed layer's first pass and of its recomputation."""
    reading = _READING.get()
    return nullcontext(), nullcontext() if reading is None else reading.active()


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """``[1, S, H, D]`` from ``[1, H, S, D]`` and twice ``[1, K, S, D]``; see transformers."""
    reading = _READING.get()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    told = {name for name, value in others.items() if value is not None and value is not False}
    if reading is None or attention_mask is not None or dropout or not causal or told - HARMLESS:
        raise RuntimeError(f"packed rows have no attention with {', '.join(told) or 'a mask'}")
    reading.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return reading.kernel(q, k, v, reading.layout, scale).unsqueeze(0), None


def _no_mask(*, mask_function: Any, **_: Any) -> None:
    """The layout is the mask, of models that are causal otherwise."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function:
        raise RuntimeError("some tokens see tokens behind them, or not all before them")
