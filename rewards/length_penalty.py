"""A soft penalty on completions that come close to the length limit."""

from __future__ import annotations

from typing import Any


class LengthPenalty:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13).

    With T the number of sampled tokens, L the limit and C the buffer::

        0                  if T <= L - C
        (L - C - T) / C    if L - C < T <= L
        -1                 if T > L

    Range [-1, 0]; there is nothing to parse.

    Args:
        max_length: L, in tokens.
        buffer: C, in tokens: the last stretch, over which the penalty grows.

    Raises:
        ValueError: not ``0 < buffer <= max_length``.
    """

    def __init__(self, max_length: int, buffer: int) -> None:
        if not 0 < buffer <= max_length:
            raise ValueError(f"need 0 < buffer <= max_length; got {buffer} and {max_length}")
        self.max_length = max_length
        self.buffer = buffer

    def __call__(self, lengths: list[int], **_columns: Any) -> list[float | None]:
        """Score by ``lengths``, the number of sampled tokens of each completion."""
        return [self._penalty(length) for length in lengths]

    def _penalty(self, length: int) -> float:
        excess = length - (self.max_length - self.buffer)
        return -min(max(excess / self.buffer, 0.0), 1.0)
