"""Who the rows of a rollout are: of which prompt, which sample, which stratum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgrpo.protocols import Prompt


@dataclass(frozen=True)
class Rows:
    """B rows, those of a prompt together.

    Attributes:
        prompts: of each row.
        names: ``(seed, prompt index, sample)`` of each row, which names its noise; rows of one
            sample in different strata have one name.
        prompt_row: ``[B]`` int64, which of the prompts.
        stratum: ``[B]`` int64.
    """

    prompts: list[Prompt]
    names: list[tuple[int, ...]]
    prompt_row: Tensor
    stratum: Tensor


def lay_out(
    prompts: Sequence[Prompt], *, group_size: int, strata: int, seed: int, device: torch.device
) -> Rows:
    """Give every prompt ``group_size`` samples in each of ``strata``, the first stratum first."""
    places = [(row, stratum, member)
              for row in range(len(prompts))
              for stratum in range(strata)
              for member in range(group_size)]  # fmt: skip
    return Rows(
        prompts=[prompts[row] for row, _, _ in places],
        names=[(seed, prompts[row].index, member) for row, _, member in places],
        prompt_row=torch.tensor([row for row, _, _ in places], device=device),
        stratum=torch.tensor([stratum for _, stratum, _ in places], device=device),
    )
