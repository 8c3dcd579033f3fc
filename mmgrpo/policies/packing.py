"""Prompts and completions of different lengths as one row without padding, each prompt once.

All tokens of the prompts come first, then those that the network reads of each completion (all but
the last), those of a prompt's completions behind one another.

Shapes: P prompts of up to Lp tokens, R rows of W completion tokens that are looked at, S tokens in
all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmgrpo.policies.decoding import continue_positions, next_position
from mmgrpo.policies.ragged import Ragged, rectangles
from mmgrpo.policies.token_payload import TokenPayload


class Layout:
    """Which token of a packed row belongs to what.

    Attributes:
        prompts: the prompts.
        rows: the completions that have tokens.
        owner: prompt of each of them.
    """

    def __init__(self, prompts: Tensor, rows: Tensor, owner: Tensor) -> None:
        """Take lengths, and the owners in ascending order.

        Args:
            prompts: ``[P]`` int64 tokens of the prompts.
            rows: ``[r]`` int64 tokens of the completions, all positive.
            owner: ``[r]`` int64.
        """
        self.prompts, self.rows, self.owner = Ragged(prompts), Ragged(rows), owner
        self._lengths = (prompts, rows)

    @cached_property
    def parts(self) -> list[list[tuple[Ragged, Ragged]]]:
        """Rectangles of prompts, of completions, and of a prompt's completions with the prompt."""
        prompts, rows = self._lengths
        groups = torch.zeros_like(prompts).index_add_(0, self.owner, rows)
        pairs = [(prompts, prompts), (rows, rows), (groups, prompts)]
        return [rectangles(*each) for each in pairs[: 3 if len(rows) else 1]]

    @cached_property
    def sequence(self) -> Tensor:
        """``[S]`` int64: the prompt of a prompt's token; P + number of a completion's."""
        numbers = torch.arange(self.prompts.count + self.rows.count, device=self.owner.device)
        return numbers.repeat_interleave(torch.cat(self._lengths))

    @cached_property
    def before(self) -> Tensor:
        """``[S]`` int64: the sequence in front of a token's own; -1 for a prompt's tokens."""
        start = torch.full_like(self._lengths[0], -1)
        return torch.cat([start, self.owner]).repeat_interleave(torch.cat(self._lengths))

    @cached_property
    def sees(self) -> Callable[[Tensor, Tensor], Tensor]:
        """From the numbers of two tokens in the row to whether the first attends to the second."""
        sequence, before = self.sequence, self.before

        def sees(query: Tensor, key: Tensor) -> Tensor:
            own = (sequence[query] == sequence[key]) & (query >= key)
            return own | (before[query] == sequence[key])

        return sees

    @cached_property
    def visible(self) -> Tensor:
        """``[r, W, Lp + W]`` bool: what tokens of completions see of their prompt and their own."""
        width, rows = self.rows.width, len(self.owner)
        before = self.prompts.inside[self.owner, None].expand(-1, width, -1)
        own = before.new_ones(width, width).tril().expand(rows, -1, -1)
        return torch.cat([before, own], dim=-1)

    @cached_property
    def blocks(self) -> Any:
        """:attr:`sees` for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        length, device = len(self.sequence), self.owner.device
        return create_block_mask(
            lambda _, __, query, key: self.sees(query, key),
            None, None, length, length, device=device, _compile=device.type != "cpu",
        )  # fmt: skip


@dataclass(frozen=True)
class PackedRow:
    """What the network reads, and where the decisions stand in it.

    Attributes:
        ids: ``[1, S]`` int64.
        positions: ``[1, S]`` or ``[axes, 1, S]`` position ids.
        aligned: name -> ``[1, S]`` further per-token inputs, zero in completions.
        keep: ``[N]`` int64: the tokens in front of the N decisions, row by row.
        layout: which token belongs to what.
    """

    ids: Tensor
    positions: Tensor
    aligned: dict[str, Tensor]
    keep: Tensor
    layout: Layout


def pack(payload: TokenPayload, keep: Tensor, positions: Tensor) -> PackedRow:
    """Put the prompts and what has to be read of the completions into one row.

    Args:
        payload: prompts and completions.
        keep: ``[R, W]`` bool: the decisions. A row is read up to its last one.
        positions: ``[P, Lp]`` or ``[axes, P, Lp]`` position ids of the prompts.
    """
    prompts, owner, mask = payload.prompts, payload.prompt_row, payload.prompts.mask
    lengths = mask.sum(dim=1)
    place = torch.arange(keep.shape[1], device=keep.device)
    read = (keep * place).amax(dim=1)
    order = owner.argsort(stable=True)
    order = order[read[order] > 0]
    layout = Layout(lengths, read[order], owner[order])
    width, inside = layout.rows.width, layout.rows.inside
    follow = continue_positions(next_position(positions)[owner[order]], width, positions.shape[:-2])

    def row(of_prompts: Tensor, of_rows: Tensor) -> Tensor:
        return torch.cat([of_prompts[..., mask], of_rows[..., inside]], dim=-1).unsqueeze(-2)

    ids = payload.completion_ids[order, :width]
    ends = read[order].cumsum(0) + layout.prompts.total
    start = torch.zeros_like(read).index_copy_(0, order, ends - read[order])
    last = lengths.cumsum(0)[owner] - 1
    front = torch.where(place == 0, last[:, None], start[:, None] + place - 1)
    return PackedRow(
        ids=row(prompts.ids, ids),
        positions=row(positions, follow),
        aligned={n: row(value, torch.zeros_like(ids)) for n, value in prompts.aligned.items()},
        keep=front[keep],
        layout=layout,
    )
