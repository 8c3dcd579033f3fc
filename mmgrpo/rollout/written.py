"""The tokens that an engine has written so far, and what it read of them.

Shapes: R rows of T tokens at most, of which r are being written; V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

LATEST = 2**17
"""Log-probabilities from which on they are read; fewer wait for those of the next tokens."""


@dataclass
class Written:
    """What has been written so far.

    Attributes:
        ids: ``[R, T]``.
        log_prob: ``[R, T]``, without what :meth:`settle` has yet to put there.
        entropy: ``[R, T]``, likewise.
        length: ``[R]`` how many tokens a row had when it was settled.
        ended: ``[R]`` whether a row ended by itself.
        latest: of the last tokens, the ``[r, V]`` log-probabilities and probabilities of their
            places, and the tokens ``[r]``.
    """

    ids: Tensor
    log_prob: Tensor
    entropy: Tensor
    length: Tensor
    ended: Tensor
    latest: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

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

    def settle(
        self, rows: Tensor, count: Tensor, entropy: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Read the latest tokens of ``rows [r]``, which have ``count [r]`` tokens now.

        To be called before other rows are written.
        """
        if not self.latest:
            return
        columns = zip(*self.latest, strict=True)
        log_p, probs, tokens = (
            torch.stack(parts, dim=1) if len(parts) > 1 else parts[0].unsqueeze(1)
            for parts in columns
        )
        place = count[:, None] - torch.arange(len(self.latest), 0, -1, device=count.device)
        self.log_prob[rows[:, None], place] = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        self.entropy[rows[:, None], place] = entropy(log_p, probs)
        self.length[rows] = count
        self.latest.clear()

    def is_full(self) -> bool:
        """Whether :meth:`settle` should be called for the sake of memory."""
        return len(self.latest) * self.latest[-1][0].numel() >= LATEST

    def select(self, rows: Tensor) -> Written:
        """What was read of some rows."""
        return Written(
            ids=self.ids[rows],
            log_prob=self.log_prob[rows],
            entropy=self.entropy[rows],
            length=self.length[rows],
            ended=self.ended[rows],
        )
