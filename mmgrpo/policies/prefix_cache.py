"""Keys and values of a group's prompt once, and of each row's own tokens behind it.

The scores of a prompt's tokens are computed for all rows of its group together, those of a row's
own tokens by themselves (arXiv:2402.05099); one softmax is over both. A short prompt costs less as
a copy for each row than in products of its own, and becomes the first of a row's own tokens.

Shapes: r rows, of P prompts with up to n rows each; Lp prompt tokens, up to C own ones; H heads of
keys, g queries for each of them, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MIN_ROOM = 64
"""Tokens of room that is left at least, when there has to be more."""
COPIED = 2**18
"""Numbers in the copies of the prompts' keys and values, up to which rows have their own."""

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
        # keys and values of each layer, [layers, 2, r, H, C, D]: all are moved and seen at once
        self._own = torch.stack([torch.stack(pair)[:, :, :, :0] for pair in prompts])
        self._length = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        self._start = torch.zeros_like(self._length)
        self._most, self._equal = 0, True
        self._arrange(torch.arange(len(mask), device=mask.device))

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, repeats allowed, and the prompts they need."""
        kept, owner = torch.unique(self._owner[rows], return_inverse=True)
        if len(kept) < len(self._mask):
            mask = self._mask[kept]
            start = _common_padding(mask)
            self._mask = mask[:, start:]
            self._prompts = [(k[kept, :, start:], v[kept, :, start:]) for k, v in self._prompts]
        self._own = self._own[:, :, rows]
        self._length, self._start = self._length[rows], self._start[rows]
        self._measure()
        self._arrange(owner)

    def join(self, other: PrefixCache) -> None:
        """Put another cache's rows below these."""
        self._copy_short_prompts()
        other._copy_short_prompts()
        width = max(self._mask.shape[1], other._mask.shape[1])
        room = max(self._most, other._most) + MIN_ROOM
        owner = torch.cat([self._owner, other._owner + len(self._mask)])
        pairs = zip(self._prompts, other._prompts, strict=True)
        self._prompts = [
            (_below(k, its_k, width, left=True), _below(v, its_v, width, left=True))
            for (k, v), (its_k, its_v) in pairs
        ]
        self._own = _below(self._own, other._own, room, left=False)
        masks = (self._mask, other._mask)
        self._mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        self._length = torch.cat([self._length, other._length])
        self._start = torch.cat([self._start, other._start])
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
        self._rows = torch.arange(len(owner), device=owner.device)
        whole = bool(self._mask.all()) and not bool(self._start.any())
        self._hides = not (self._equal and whole)

    def open(self) -> None:
        """Make room for one token more of each row; :meth:`attend` then writes it, layer by layer.

        Rows of different lengths have their tokens aligned on the left.
        """
        self._copy_short_prompts()
        if self._most == self._own.shape[4]:
            self._own = pad(self._own, (0, 0, 0, max(MIN_ROOM, self._most // 4)))
        self._slot, self._length = self._length, self._length + 1
        self._most += 1
        self._hidden = self._find_hidden() if self._hides else None
        keys, values = self._own.narrow(4, 0, self._most).flatten(2, 3).unbind(1)
        self._keys, self._values = keys.mT.unbind(), values.unbind()  # [r * H, D, C], [r * H, C, D]
        pairs = self._own.transpose(1, 2)
        self._pairs = (pairs.select(4, self._most - 1) if self._equal else pairs).unbind()

    def _copy_short_prompts(self) -> None:
        """Make prompts the first of the rows' own tokens, if they are short and nothing follows."""
        keys = self._prompts[0][0]
        if self._most or 2 * len(self._owner) * keys[0].numel() > COPIED:
            return
        room = (0, 0, 0, MIN_ROOM)
        own = [torch.stack([pad(x, room)[self._owner] for x in pair]) for pair in self._prompts]
        self._own = torch.stack(own)
        self._start = (~self._mask).sum(dim=1)[self._owner]
        self._length = torch.full_like(self._start, keys.shape[2])
        self._prompts = [(k[:, :, :0], v[:, :, :0]) for k, v in self._prompts]
        self._mask = self._mask[:, :0]
        self._measure()
        self._arrange(self._owner)

    def _find_hidden(self) -> Tensor:
        """``[r, 1, Lp + C]`` bool: what a row's queries must not find."""
        place = torch.arange(self._most, device=self._length.device)
        own = (place < self._start[:, None]) | (place >= self._length[:, None])
        return torch.cat([~self._mask[self._owner], own], dim=1)[:, None]

    def attend(self, layer: int, queries: Tensor, pair: Tensor) -> Tensor:
        """Write a token of each row, and return what its queries find.

        Args:
            layer: number of the layer.
            queries: ``[r, H * g, D]``, already scaled.
            pair: ``[r, 2, H, D]``, the keys and the values.

        Returns:
            ``[r, H * g * D]``.
        """
        keys, values = self._keys[layer], self._values[layer]
        prompt_keys, prompt_values = self._prompts[layer]
        heads, length = prompt_keys.shape[1:3]
        if self._equal:
            self._pairs[layer].copy_(pair)
        else:
            self._pairs[layer][self._rows, :, :, self._slot] = pair

        count = len(keys)
        scores = queries.reshape(count, -1, queries.shape[-1]).bmm(keys)
        if length:
            shared = self._gather(queries, heads).bmm(prompt_keys.flatten(0, 1).mT)
            shared = self._scatter(shared, heads)
            scores = torch.cat([shared, scores.view(*shared.shape[:-1], -1)], dim=-1)
            scores = scores.view(count, -1, scores.shape[-1])
        scores = scores.float()
        if self._hidden is not None:
            scores.view(len(queries), -1, scores.shape[-1]).masked_fill_(self._hidden, -torch.inf)

        weights = scores.softmax(dim=-1).to(values.dtype)
        if not length:
            return weights.bmm(values).view(len(queries), -1)
        found = weights.narrow(2, length, self._most).bmm(values)
        on_prompt = weights.narrow(2, 0, length).unflatten(0, (len(queries), heads)).flatten(1, 2)
        shared = self._gather(on_prompt, heads).bmm(prompt_values.flatten(0, 1))
        shared = self._scatter(shared, heads)
        return (found.view(shared.shape) + shared).view(len(queries), -1)

    def _gather(self, states: Tensor, heads: int) -> Tensor:
        """Turn ``[r, H * g, X]`` into ``[P * H, n * g, X]``, the rows of a prompt side by side."""
        count = len(self._mask)
        if self._place is not None:
            places = states.new_zeros((count * self._width, *states.shape[1:]))
            states = places.index_copy_(0, self._place, states)
        states = states.view(count, self._width, heads, -1, states.shape[-1])
        return states.transpose(1, 2).reshape(count * heads, -1, states.shape[-1])

    def _scatter(self, states: Tensor, heads: int) -> Tensor:
        """Undo :meth:`_gather`: return ``[r, H, g, X]``, or ``[P, n, H, g, X]`` without gaps."""
        states = states.view(len(self._mask), heads, self._width, -1, states.shape[-1])
        states = states.transpose(1, 2)
        return states if self._place is None else states.flatten(0, 1)[self._place]


def _below(mine: Tensor, its: Tensor, length: int, *, left: bool) -> Tensor:
    """Put the rows of ``[..., r, H, L, D]`` below each other, filled up or cut to a length."""

    def fill(states: Tensor) -> Tensor:
        missing = length - states.shape[-2]
        return pad(states, (0, 0, *((missing, 0) if left else (0, missing))))

    return torch.cat([fill(mine), fill(its)], dim=-4)


def _common_padding(mask: Tensor) -> int:
    used = mask.any(dim=0)
    return int(used.to(torch.uint8).argmax()) if bool(used.any()) else len(used)
