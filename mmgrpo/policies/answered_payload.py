"""Pictures and what the model answered about them, as decisions of one row.

Shapes: B pictures of W decisions, Q answers of up to A tokens, T = W + (most questions of a
picture) x A columns: answer n of a picture stands in columns W + n A to W + n A + A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.policies.token_payload import TokenPayload, pad_right
from mmgrpo.protocols import Evaluation

ANSWERS = 2
"""Segment of the decisions in answers."""


class AnswerPayload(TokenPayload):
    """Completions that answer questions: every place is for words."""


@dataclass(frozen=True)
class AnsweredPayload:
    """Pictures, and the answers about them.

    Attributes:
        drawn: of the pictures.
        answers: of the answers, one row each.
        row: ``[Q]`` int64, the picture of each.
        number: ``[Q]`` int64, which of the picture's questions it answers.
        width: W.
        room: A.
    """

    drawn: TokenPayload
    answers: AnswerPayload
    row: Tensor
    number: Tensor
    width: int
    room: int

    @property
    def columns(self) -> Tensor:
        """``[Q, A]`` where the tokens of each answer stand."""
        place = torch.arange(self.room, device=self.number.device)
        return self.width + self.number[:, None] * self.room + place

    def select(self, rows: Tensor) -> Self:
        """Return the given pictures with their answers."""
        row, kept = (self.row[None] == rows[:, None]).nonzero(as_tuple=True)
        return replace(
            self,
            drawn=self.drawn.select(rows),
            answers=self.answers.select(kept),
            row=row,
            number=self.number[kept],
        )

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in _PARTS}
        return replace(self, **moved)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join."""
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part.drawn.prompt_row))
        return replace(
            parts[0],
            drawn=TokenPayload.cat([part.drawn for part in parts]),
            answers=AnswerPayload.cat([part.answers for part in parts]),
            row=torch.cat([p.row + start for p, start in zip(parts, starts, strict=False)]),
            number=torch.cat([part.number for part in parts]),
        )

    def split(self, trajectories: Trajectories) -> tuple[Trajectories, Trajectories]:
        """Return the pictures' decisions and the answers', to be evaluated by themselves."""
        group, mask = trajectories.group, trajectories.mask
        answered = mask[self.row[:, None], self.columns]
        return (
            Trajectories(group=group, mask=mask[:, : self.width], payload=self.drawn),
            Trajectories(group=group[self.row], mask=answered, payload=self.answers),
        )

    def join(self, drawn: Tensor, answered: Tensor, size: int) -> Tensor:
        """``[B, size]`` of values ``[B, W]`` and ``[Q, A]``."""
        whole = pad_right(drawn, size)
        return whole.index_put((self.row[:, None], self.columns), answered)

    def joined(self, drawn: Evaluation, answered: Evaluation, size: int) -> Evaluation:
        """The evaluation of both."""
        log_prob = self.join(drawn.log_prob, answered.log_prob, size)
        if drawn.entropy is None or answered.entropy is None:
            return Evaluation(log_prob)
        return Evaluation(log_prob, self.join(drawn.entropy, answered.entropy, size))


_PARTS = ("drawn", "answers", "row", "number")


def with_answers(
    drawn: Trajectories, answered: Trajectories, counts: Sequence[int], *, width: int, room: int
) -> Trajectories:
    """Let the answers about pictures be decisions of the pictures' rows.

    Args:
        drawn: B pictures.
        answered: one row for each answer, picture by picture.
        counts: how many questions each picture was asked.
        width: W, at least the decisions of a picture.
        room: A, at least the tokens of an answer.

    Returns:
        ``drawn`` with T columns; ``segment`` is 2 in the answers.
    """
    count = torch.tensor(counts, device=drawn.group.device)
    row = torch.arange(len(counts), device=count.device).repeat_interleave(count)
    number = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    payload = AnsweredPayload(drawn.payload, answered.payload, row, number, width, room)
    size = width + max(counts) * room

    def both(name: str) -> Tensor:
        one, other = (getattr(part, name) for part in (drawn, answered))
        return payload.join(pad_right(one, width), pad_right(other, room), size)

    segment = torch.full_like(answered.mask, ANSWERS, dtype=torch.int64)
    names = ("mask", "old_log_prob", "entropy", "segment")
    answered = answered.replace(segment=segment)
    return drawn.replace(**{name: both(name) for name in names}, payload=payload)
