"""Sequences of different lengths, one behind the other, and the rectangles they are computed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLACK = 0.25
"""Pairs of tokens that are computed in vain, of those that count."""
CALL = 2**12
"""Pairs of tokens that cost as much as another call."""


class Ragged:
    """Sequences among tokens that lie behind one another, and the rectangle that holds them.

    Attributes:
        count: sequences.
        width: tokens of the longest.
        total: tokens in all.
        even: whether all have the same length.
        inside: ``[count, width]`` bool, off behind the end of a sequence.
        whole: whether the sequences are all there are, in order.
    """

    def __init__(self, lengths: Tensor, start: Tensor | None = None) -> None:
        """Find the sequences.

        Args:
            lengths: ``[count]`` int64.
            start: ``[count]`` int64, their first tokens; None: they are all there are, in order.
        """
        sizes = lengths.tolist()
        self.count, self.total = len(sizes), sum(sizes)
        self.width = max(sizes, default=0)
        self.even = self.count * self.width == self.total
        self.whole = start is None
        start = lengths.cumsum(0) - lengths if start is None else start
        place = torch.arange(self.width, device=lengths.device)
        self.inside = place < lengths[:, None]
        places = torch.where(self.inside, start[:, None] + place, 0)
        self._places, self._tokens = places.flatten(), places[self.inside]
        self._within = self.inside.flatten().nonzero().squeeze(1)

    def pad(self, x: Tensor) -> Tensor:
        """``[n, ...]`` to ``[count, width, ...]``, any of the numbers behind the ends."""
        view = self.whole and self.even
        x = x if view else x.index_select(0, self._places)
        return x.unflatten(0, (self.count, self.width))

    def fill(self, x: Tensor, value: float) -> Tensor:
        """Like :meth:`pad`, with a value behind the ends."""
        if self.even:
            return self.pad(x)
        x = x if self.whole else x.index_select(0, self._tokens)
        whole = x.new_full((self.count * self.width, *x.shape[1:]), value)
        return whole.index_copy_(0, self._within, x).unflatten(0, (self.count, self.width))

    def flat(self, x: Tensor) -> Tensor:
        """``[count, width, ...]`` to ``[total, ...]``, without what lies behind the ends."""
        x = x.flatten(0, 1)
        return x if self.even else x.index_select(0, self._within)

    def put(self, x: Tensor, into: Tensor) -> None:
        """Write ``[count, width, ...]`` to where the sequences are in ``[n, ...]``."""
        into.index_copy_(0, self._tokens, self.flat(x))


def join(sides: Sequence[Ragged], parts: Sequence[Tensor], count: int) -> Tensor:
    """Return the ``[count, ...]`` tokens of rectangles, zero where no rectangle has them."""
    if sides[0].whole:
        return sides[0].flat(parts[0])
    into = parts[0].new_zeros(count, *parts[0].shape[2:])
    for side, part in zip(sides, parts, strict=True):
        side.put(part, into)
    return into


def rectangles(queries: Tensor, keys: Tensor) -> list[tuple[Ragged, Ragged]]:
    """Put pairs of sequences of similar lengths together, so that little is computed in vain.

    Args:
        queries: ``[n]`` int64 lengths of sequences that lie behind one another.
        keys: ``[n]`` int64 lengths of the sequences that these look at.
    """
    sizes = list(zip(queries.tolist(), keys.tolist(), strict=True))
    pieces = _similar(sizes)
    if len(pieces) == 1:
        return [(Ragged(queries), Ragged(keys))]
    first = [lengths.cumsum(0) - lengths for lengths in (queries, keys)]
    found = []
    for piece in pieces:
        rows = torch.tensor(sorted(piece), device=queries.device)
        found.append((Ragged(queries[rows], first[0][rows]), Ragged(keys[rows], first[1][rows])))
    return found


def _similar(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Return the numbers of similar pairs, the largest first; of none without tokens."""
    pieces: list[list[int]] = []
    area = used = largest = 0
    areas = {number: pair[0] * pair[1] for number, pair in enumerate(sizes) if min(pair) > 0}
    for number, own in sorted(areas.items(), key=lambda item: -item[1]):
        waste = area + largest - used - own
        if not pieces or waste > CALL + SLACK * (used + own):
            pieces.append([])
            area, used, largest = 0, 0, own
        pieces[-1].append(number)
        area, used = area + largest, used + own
    return pieces
