"""The tokens that an engine has written so far, and what it read of them.

Shapes: R rows of T tokens at most, of which r are being written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Written:
    """What has been written so far.

    Attributes:
        ids: ``[R, T]``.
        log_prob: ``[R, T]``.
        entropy: ``[R, T]``.
        length: ``[R]`` tokens of the rows that are finished.
        ended: ``[R]`` whether a row ended by itself.
    """

    ids: Tensor
    log_prob: Tensor
    entropy: Tensor
    length: Tensor
    ended: Tensor

    @classmethod
    def blank(cls, rows: int, width: int, pad_id: int, device: torch.device) -> Written:
        """Nothing yet, of R rows of T tokens at most."""
        return cls(
            ids=torch.full((rows, width), pad_id, device=device),
            log_prob=torch.zeros(rows, width, device=device),
            entropy=torch.zeros(rows, width, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            ended=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    @property
    def mask(self) -> Tensor:
        """``[R, T]`` bool: where there is a token."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.length[:, None]

    def put(self, place: Tensor, tokens: Tensor, log_prob: Tensor, entropy: Tensor) -> None:
        """Write ``[r]`` tokens and what was read of them.

        Args:
            place: ``[r]`` where, counted through all rows.
            tokens: ``[r]``.
            log_prob: ``[r]``.
            entropy: ``[r]``.
        """
        columns = ((self.ids, tokens), (self.log_prob, log_prob), (self.entropy, entropy))
        for whole, part in columns:
            whole.view(-1).index_copy_(0, place, part)

    def finish(self, rows: Tensor, count: Tensor, ended: Tensor) -> None:
        """Note how many tokens some ``rows [r]`` have, and whether they ended by themselves."""
        self.length[rows] = count
        self.ended[rows] = ended

    def select(self, rows: Tensor) -> Written:
        """What was read of some rows."""
        return Written(
            ids=self.ids[rows],
            log_prob=self.log_prob[rows],
            entropy=self.entropy[rows],
            length=self.length[rows],
            ended=self.ended[rows],
        )
