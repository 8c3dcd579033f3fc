"""Prompt embeddings, computed once per text and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class TextEncoder(Protocol):
    """Turns one text into name -> ``[1, ...]`` embeddings."""

    def encode(
        self, text: str, *, device: torch.device, max_length: int | None
    ) -> dict[str, Tensor]:
        """Encode on ``device`` with at most ``max_length`` tokens (None: the model's own)."""
        ...


class PromptCache:
    """Least-recently-used cache of prompt embeddings, held on the CPU.

    Each text is encoded alone, so its embedding never depends on the batch it came in.

    Args:
        encoder: what encodes a text.
        max_length: most tokens of a text; None takes the encoder's own.
        capacity: most texts that are kept.
    """

    def __init__(
        self, encoder: TextEncoder, *, max_length: int | None, capacity: int = 1024
    ) -> None:
        self._encoder = encoder
        self._max_length = max_length
        self._capacity = capacity
        self._known: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def get(self, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Return name -> ``[len(texts), ...]`` on ``device``."""
        rows = [self._row(text, device) for text in texts]
        return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}

    @torch.no_grad()
    def _row(self, text: str, device: torch.device) -> dict[str, Tensor]:
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        encoded = self._encoder.encode(text, device=device, max_length=self._max_length)
        row = self._known[text] = {name: value.cpu() for name, value in encoded.items()}
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return row
