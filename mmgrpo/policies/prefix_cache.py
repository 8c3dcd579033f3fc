"""Keys and values of a group's prompt once, and of each row's own tokens behind it.

A row attends to its prompt together with the rest of its group, and to its own tokens by itself;
the two softmaxes are merged by their log-sum-exp (arXiv:2402.05099). Nothing is fanned out.

Shapes: r rows, of P prompts with up to n rows each; Lp prompt tokens, up to C own ones; H heads of
keys, g queries for each of them, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MIN_ROOM = 16
"""Tokens of room that is left at least, when there has to be more."""

Pair = tuple[Tensor, Tensor]


class PrefixCache:
    """The keys and values of rows that share prompts; not for gradients."""

    def __init__(self, prompts: list[Pair], mask: Tensor) -> None:
        """Start with one row for each prompt.

        Args:
            prompts: keys and values ``[P, H, Lp, D]`` of each layer.
            mask: ``[P, Lp]`` bool, off on padding.
        """
        self._prompts, self._mask = prompts, mask
        self._own = [(keys[:, :, :0], values[:, :, :0]) for keys, values in prompts]
        self._length = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        self._most, self._equal = 0, True
        self._own_bias: Tensor | None = None
        self._arrange(torch.arange(len(mask), device=mask.device))

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, repeats allowed, and the prompts they need."""
        kept, owner = torch.unique(self._owner[rows], return_inverse=True)
        if len(kept) < len(self._mask):
            mask = self._mask[kept]
            start = _common_padding(mask)
            self._mask = mask[:, start:]
            self._prompts = [(k[kept, :, start:], v[kept, :, start:]) for k, v in self._prompts]
        self._own = [(keys[rows], values[rows]) for keys, values in self._own]
        self._length = self._length[rows]
        self._measure()
        self._arrange(owner)

    def join(self, other: PrefixCache) -> None:
        """Put another cache's rows below these."""
        width = max(self._mask.shape[1], other._mask.shape[1])
        room = max(self._most, other._most) + MIN_ROOM
        owner = torch.cat([self._owner, other._owner + len(self._mask)])
        pairs = zip(self._prompts, other._prompts, strict=True)
        self._prompts = [_join(mine, its, (width, 0)) for mine, its in pairs]
        pairs = zip(self._own, other._own, strict=True)
        self._own = [_join(mine, its, (0, room)) for mine, its in pairs]
        masks = (self._mask, other._mask)
        self._mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        self._length = torch.cat([self._length, other._length])
        self._measure()
        self._arrange(owner)

    def _measure(self) -> None:
        lengths = self._length.tolist()
        self._most = max(lengths)
        self._equal = min(lengths) == self._most

    def _arrange(self, owner: Tensor) -> None:
        """Give each row one of the P * n places that the queries of the groups have."""
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=len(self._mask))
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(owner)
        rank[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]
        self._owner, self._width = owner, int(counts.max())
        place = owner * self._width + rank
        everywhere = torch.arange(len(counts) * self._width, device=owner.device)
        self._place = None if torch.equal(place, everywhere) else place
        self._bias = None
        if not bool(self._mask.all()):
            self._bias = _bias(self._mask, self._prompts[0][0].dtype)

    def open(self) -> None:
        """Make room for one token more of each row; :meth:`attend` then writes it, layer by layer.

        Rows of different lengths have their tokens aligned on the left.
        """
        if self._most == self._own[0][0].shape[2]:
            room = max(MIN_ROOM, self._most // 4)
            self._own = [(_more(keys, room), _more(values, room)) for keys, values in self._own]
        self._most += 1
        self._rows = torch.arange(len(self._length), device=self._length.device)
        self._slot = self._length
        self._length = self._length + 1
        self._own_bias = None
        if not self._equal:
            place = torch.arange(self._most, device=self._length.device)
            self._own_bias = _bias(place < self._length[:, None], self._own[0][0].dtype)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write a token of each row, and return what its queries find.

        Args:
            layer: number of the layer.
            queries: ``[r, H * g, D]``, already scaled.
            keys: ``[r, H, D]``.
            values: ``[r, H, D]``.

        Returns:
            ``[r, H * g * D]``.
        """
        count, heads, _, size = self._prompts[layer][0].shape
        pair = self._own[layer]
        if self._equal:
            for full, states in zip(pair, (keys, values), strict=True):
                full.select(2, self._most - 1).copy_(states)
        else:
            for full, states in zip(pair, (keys, values), strict=True):
                full[self._rows, :, self._slot] = states
        own = (pair[0].narrow(2, 0, self._most), pair[1].narrow(2, 0, self._most))
        grouped = queries.reshape(len(keys), heads, -1, size)
        alone, alone_lse = attention(grouped, own, self._own_bias)
        spread, place = queries, self._place
        if place is not None:
            places = queries.new_zeros((count * self._width, *queries.shape[1:]))
            spread = places.index_copy_(0, place, queries)
        spread = spread.reshape(count, self._width, heads, -1, size).transpose(1, 2).flatten(2, 3)
        found, lse = attention(spread, self._prompts[layer], self._bias)
        shape = (count, heads, self._width, -1)
        found, lse = found.view(*shape, size).transpose(1, 2), lse.view(shape).transpose(1, 2)
        if place is not None:
            found, lse = found.flatten(0, 1)[place], lse.flatten(0, 1)[place]
        weight = (lse - alone_lse.view(lse.shape)).sigmoid_().unsqueeze(-1).to(found.dtype)
        return torch.lerp(alone.view(found.shape), found, weight).reshape(len(keys), -1)


def attention(queries: Tensor, pair: Pair, bias: Tensor | None) -> Pair:
    """Return what scaled queries find, and the log of the sum of their scores' exponentials.

    Args:
        queries: ``[B, H, n, D]``.
        pair: keys and values ``[B, H, L, D]``.
        bias: None or ``[B, 1, 1, L]``, minus infinity where nothing may be found.

    Returns:
        ``[B, H, n, D]`` and float32 ``[B, H, n]``.
    """
    keys, values = pair
    if queries.device.type == "cpu":
        # The public function computes the log-sum-exp too, but does not return it.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
        found, lse = kernel(queries, keys, values, attn_mask=bias, scale=1.0)
        return found, lse
    return plain_attention(queries, pair, bias)


def plain_attention(queries: Tensor, pair: Pair, bias: Tensor | None) -> Pair:
    """Return what :func:`attention` returns, from matrix products."""
    keys, values = pair
    scores = (queries @ keys.transpose(-1, -2)).float()
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().to(values.dtype) @ values, lse


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, 1, 1, L]``: 0 in the mask, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)[
        :, None, None
    ]


def _more(states: Tensor, room: int) -> Tensor:
    larger = states.new_zeros((*states.shape[:2], states.shape[2] + room, states.shape[3]))
    larger[:, :, : states.shape[2]] = states
    return larger


def _join(mine: Pair, its: Pair, size: tuple[int, int]) -> Pair:
    """Concatenate rows whose tokens are filled up, on the left or on the right, to a number."""
    left, right = size

    def fill(states: Tensor) -> Tensor:
        count = states.shape[2]
        if right:
            states, count = states[:, :, :right], min(count, right)
        return pad(states, (0, 0, max(left - count, 0), max(right - count, 0)))

    one, two = (torch.cat([fill(a), fill(b)]) for a, b in zip(mine, its, strict=True))
    return one, two


def _common_padding(mask: Tensor) -> int:
    return int(mask.any(dim=0).to(torch.uint8).argmax())
