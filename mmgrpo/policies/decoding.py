"""A causal language model step by step: prompts once, then their continuations on a KV cache.

Shapes: R rows that stand at the end of what they have read so far, n new tokens, L tokens read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class SelectiveHead:
    """Makes a model's output head compute the logits of chosen positions only, or of none.

    A pre-hook on the head replaces the hidden states ``[B, L, D]`` by the chosen ``[1, N, D]``.
    Whatever the model does to the logits afterwards (scale, soft cap) stays as it is, and the
    model is called as a whole, which wrappers for distributed training need.
    """

    def __init__(self, head: nn.Module) -> None:
        self._keep: Tensor | None = None
        self._withhold = False
        self._hidden: Tensor | None = None
        head.register_forward_pre_hook(self._gather)

    @contextmanager
    def keeping(self, keep: Tensor | None, *, withhold: bool = False) -> Iterator[None]:
        """Within the context, logits are ``[1, N, V]``, of the N positions in ``keep [B, L]``.

        Where B is 1, ``keep`` may be ``[N]`` int64 positions, see :func:`kept`.

        With ``withhold`` they are ``[1, 0, V]``, and :meth:`take_hidden` returns what was kept.
        """
        self._keep, self._withhold = keep, withhold
        try:
            yield
        finally:
            self._keep, self._withhold = None, False

    def take_hidden(self) -> Tensor:
        """Return the ``[N, D]`` hidden states that the head was not given, once."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError("the model did not call its output head")
        return hidden

    def _gather(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._keep is None:
            return None
        hidden = kept(args[0], self._keep)[None]
        if self._withhold:
            self._hidden, hidden = hidden[0], hidden[:, :0]
        return (hidden, *args[1:])


def kept(states: Tensor, keep: Tensor) -> Tensor:
    """Return ``[N, D]`` of ``[B, L, D]``.

    Args:
        states: ``[B, L, D]``.
        keep: ``[B, L]`` bool; or, where B is 1, ``[N]`` int64 positions, repeats allowed.
    """
    return states[keep] if keep.dtype == torch.bool else states[0, keep]


class Forward(Protocol):
    """A way to call the network."""

    def __call__(
        self, keep: Tensor, *, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None
    ) -> tuple[Tensor, Any]:
        """Return the ``[N, V]`` logits (or the head's input) at the N kept positions, the cache."""
        ...


class TokenState:
    """Rows on a KV cache, and the logits of the token that follows each of them.

    Attributes:
        logits: ``[R, V]`` as the model gives them.
        cache: keys and values, as transformers keeps them.
        mask: ``[R, L]`` bool, which cached tokens count.
        axes: shape of position ids before ``[R, L]``.
        next: ``[R]`` position of the token that follows.
    """

    def __init__(
        self, forward: Forward, *, cache: Any, mask: Tensor, positions: Tensor, logits: Tensor
    ) -> None:
        """Take over the result of a prefill.

        Args:
            forward: how to call the network.
            cache: keys and values of the prompts.
            mask: ``[R, L]`` bool, which cached tokens count.
            positions: ``[R, L]`` or ``[axes, R, L]`` position ids of the prompts.
            logits: ``[R, V]``.
        """
        self._forward = forward
        self.cache = cache
        self.mask = mask
        self.axes = positions.shape[:-2]
        self.next = next_position(positions)
        self.logits = logits

    def select(self, rows: Tensor) -> None:
        """Keep the given rows; repeats fan a prompt out to its group. Gradients pass through."""
        # Only reorder_cache moves the states of recurrent layers; only the other has a
        # deterministic backward on GPUs.
        recurrent = any(hasattr(layer, "recurrent_states") for layer in self.cache.layers)
        (self.cache.reorder_cache if recurrent else self.cache.batch_select_indices)(rows)
        self.mask = self.mask[rows]
        self.next = self.next[rows]
        self.logits = self.logits[rows]

    def join(self, other: TokenState) -> bool:
        """Take over the rows of another state, below the present ones; not for gradients.

        Returns:
            False, and nothing has changed, where a layer of the model keeps less than all tokens.
        """
        if not (self._grow_in_place() and other._grow_in_place()):
            return False
        start = int(self.mask.any(dim=0).to(torch.uint8).argmax())  # padding of rows that left
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.join(theirs, start)
        masks = (self.mask[:, start:], other.mask)
        width = max(mask.shape[1] for mask in masks)
        pad = torch.nn.functional.pad
        self.mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        self.next = torch.cat([self.next, other.next])
        self.logits = torch.cat([self.logits, other.logits])
        return True

    def _grow_in_place(self) -> bool:
        """Let the cache grow in place where it can; return whether all of it does."""
        from mmgrpo.policies.growing_cache import grow_in_place

        return grow_in_place(self.cache)

    def advance(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Read ``[R, n]`` tokens and return the ``[N, V]`` logits after those in ``keep [R, n]``.

        Without ``keep``, n is 1 and every row's logits are returned and stay in ``logits``.
        """
        if keep is None:
            self._grow_in_place()
        self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], dim=1)
        logits, self.cache = self._forward(
            torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep,
            ids=tokens,
            mask=self.mask,
            positions=continue_positions(self.next, tokens.shape[1], self.axes),
            cache=self.cache,
        )
        self.next = self.next + tokens.shape[1]
        if keep is None:
            self.logits = logits
        return logits


def text_positions(mask: Tensor) -> Tensor:
    """Return ``[R, L]`` position ids that count the tokens in ``mask``, 0 on left padding."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def next_position(positions: Tensor) -> Tensor:
    """Return ``[R]``: one more than the largest position of each row, over all axes."""
    return positions.amax(dim=-1).view(-1, positions.shape[-2]).amax(dim=0) + 1


def continue_positions(start: Tensor, count: int, axes: torch.Size) -> Tensor:
    """Return ``[*axes, R, count]`` positions that follow ``start [R]``, equal on all axes."""
    steps = start[:, None] + torch.arange(count, device=start.device)
    return steps.expand(*axes, *steps.shape)
