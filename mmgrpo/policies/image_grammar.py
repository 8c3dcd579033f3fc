"""Which tokens may stand where in a sample that is a picture: a small state machine.

Shapes: B rows of T tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Self

import torch
from torch import Tensor

from mmgrpo.config.image_layout import ImageLayout
from mmgrpo.errors import ModelError


class Kind(IntEnum):
    """What a place in a sample is for; the first two are decisions, and name the segments."""

    TEXT = 0  # of the plan: ordinary text, or the token that begins the picture
    IMAGE = 1  # one of the image codes
    BEGIN = 2  # the plan is as long as it may be: the picture has to begin
    DONE = 3  # after the last code
    ANSWER = 4  # to a question about a picture: ordinary text, or its end


class ImageGrammar:
    """The kind of every place of a sample, and the tokens that each kind allows.

    Attributes:
        layout: where the codes are.
        allowed: ``[len(Kind), V]`` bool.
        forbidden: for each kind, the int64 ids that it does not allow.
    """

    def __init__(
        self,
        layout: ImageLayout,
        *,
        size: int,
        ordinary: Iterable[int],
        end_ids: Iterable[int],
    ) -> None:
        """Make the tables.

        Args:
            layout: where the codes are.
            size: V, rows of the embedding.
            ordinary: token ids of text: no special tokens, no image codes.
            end_ids: token ids that end an answer.

        Raises:
            ModelError: an id of the layout is beyond the vocabulary.
        """
        codes = range(layout.code_offset, layout.code_offset + layout.num_codes)
        markers = [layout.begin_id, layout.end_id]
        markers += [] if layout.plan_begin_id is None else [layout.plan_begin_id]
        last = max(codes[-1], *markers)
        if last >= size:
            raise ModelError(
                f"image_tokens.json names token id {last}, and the model has {size} tokens."
            )
        text = {token for token in ordinary if token < size} - {*codes, *markers}
        members: dict[Kind, Iterable[int]] = {
            Kind.TEXT: {*text, layout.begin_id},
            Kind.IMAGE: codes,
            Kind.BEGIN: {layout.begin_id},
            Kind.DONE: {layout.end_id},
            Kind.ANSWER: {*text, *end_ids},
        }
        self.layout = layout
        allowed = torch.zeros(len(Kind), size, dtype=torch.bool)
        for kind, ids in members.items():
            allowed[kind, sorted(ids)] = True
        self.allowed = allowed
        self.forbidden = tuple((~row).nonzero().squeeze(1) for row in allowed)

    def to(self, device: torch.device) -> Self:
        """Move the tables, in place."""
        if self.allowed.device != device:
            self.allowed = self.allowed.to(device)
            self.forbidden = tuple(ids.to(device) for ids in self.forbidden)
        return self

    def first_code(self, ids: Tensor) -> Tensor:
        """Return ``[B]`` places of the first code of ``ids [B, T]``; T if it did not begin."""
        if not self.layout.plan_tokens:
            return torch.zeros_like(ids[:, 0])
        begins = ids == self.layout.begin_id
        first = begins.to(torch.uint8).argmax(dim=1) + 1
        return torch.where(begins.any(dim=1), first, torch.full_like(first, ids.shape[1]))

    def kinds(self, ids: Tensor, place: Tensor) -> Tensor:
        """Return the :class:`Kind` of places, ``[B, n]`` int64, which follows what stands before.

        Args:
            ids: ``[B, T]`` tokens so far; what follows them is anything but ``begin_id``.
            place: int64 ``[n]`` or ``[B, n]``.
        """
        first = self.first_code(ids)[:, None]
        before = (place >= self.layout.plan_tokens).long() * int(Kind.BEGIN)
        after = (place >= first + self.layout.cells).long() * (Kind.DONE - Kind.IMAGE) + Kind.IMAGE
        return torch.where(place < first, before, after)

    def codes(self, ids: Tensor) -> Tensor:
        """Return the ``[B, cells]`` codes in complete samples ``ids [B, T]``."""
        inside = torch.arange(self.layout.cells, device=ids.device)
        return ids.gather(1, self.first_code(ids)[:, None] + inside) - self.layout.code_offset
