"""Keys and values that grow in place: a token is written where room was left for it.

The cache of transformers copies all keys and values for every token. Not for gradients: what was
read before would change under the backward pass.

With room, rows of different lengths can also share one cache, aligned on the right.

Shapes: R rows, H heads, L tokens so far, C >= L tokens that there is room for, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 16
"""Tokens of room that is left at least, when there has to be more."""


class GrowingLayer(DynamicLayer):
    """A cache layer whose ``keys`` and ``values`` are the first L tokens of larger tensors."""

    def __init__(self, layer: DynamicLayer) -> None:
        """Take over what another layer holds."""
        super().__init__()
        if layer.keys is None or layer.values is None:
            raise ValueError("the layer holds nothing yet")
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True
        self._full: list[Tensor] = [layer.keys, layer.values]
        self._show(layer.keys.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[R, H, n, D]`` keys and values; return all of them, ``[R, H, L, D]``."""
        del args, kwargs
        start, stop = self._length, self._length + key_states.shape[-2]
        if stop > self._full[0].shape[-2]:
            room = max(MIN_ROOM, stop // 8)
            self._full = [_with_room(full, start, stop + room) for full in self._full]
        for full, states in zip(self._full, (key_states, value_states), strict=True):
            full[..., start:stop, :] = states
        return self._show(stop)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._full = [full.index_select(0, indices) for full in self._full]
        self._show(self._length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows."""
        self.batch_select_indices(beam_idx)

    def join(self, other: GrowingLayer, start: int) -> None:
        """Put another layer's rows below these, without these rows' first ``start`` tokens.

        The shorter rows get zeros on the left: a masked value must be a number.
        """
        mine, length = len(self._full[0]), max(self._length - start, other._length)
        joined = []
        for full, its in zip(self._full, other._full, strict=True):
            ours, theirs = full[..., start : self._length, :], its[..., : other._length, :]
            shape = (mine + len(theirs), full.shape[1], length + MIN_ROOM, full.shape[-1])
            rows = full.new_zeros(shape)
            rows[:mine, :, length - ours.shape[-2] : length] = ours
            rows[mine:, :, length - theirs.shape[-2] : length] = theirs
            joined.append(rows)
        self._full = joined
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        keys, values = (full[..., :length, :] for full in self._full)
        self.keys, self.values = keys, values
        return keys, values


def _with_room(full: Tensor, length: int, capacity: int) -> Tensor:
    larger = full.new_empty((*full.shape[:-2], capacity, full.shape[-1]))
    larger[..., :length, :] = full[..., :length, :]
    return larger


def grow_in_place(cache: Any) -> bool:
    """Let the plain layers of a transformers cache grow in place; others stay as they are.

    Returns:
        Whether all layers do now; never while gradients are recorded.
    """
    if torch.is_grad_enabled():
        return False
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[place] = GrowingLayer(layer)
    return all(type(layer) is GrowingLayer for layer in cache.layers)
