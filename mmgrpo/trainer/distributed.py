"""What several processes change: sums over ranks, and one wrapped call per backward."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.protocols import Evaluation, Policy, Request


class RankCollective(Collective):
    """Sums and gathers through accelerate, over the ranks of the run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.size = accelerator.num_processes

    def sum(self, value: Tensor) -> Tensor:
        """Sum ``value`` over ranks."""
        on_device = value.to(self.accelerator.device)
        return self.accelerator.reduce(on_device, reduction="sum").to(value.device)

    def gather(self, value: Tensor) -> Tensor:
        """Concatenate the ranks' values of possibly different length along dim 0."""
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value.cpu().tolist())
        flat = [torch.tensor(part, dtype=value.dtype) for part in gathered]
        return torch.cat([part for part in flat if part.numel()]).to(value.device)


def make_collective(accelerator: Accelerator) -> Collective:
    """The collective of this run: local for one process."""
    return LOCAL if accelerator.num_processes == 1 else RankCollective(accelerator)


class EvaluationModule(nn.Module):
    """A policy's evaluation as one module call, so that DDP sees one forward per backward."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.network = policy.network
        self._evaluate = policy.evaluate

    def forward(self, trajectories: Trajectories, request: Request) -> tuple[Tensor | None, ...]:
        """Return the evaluation's fields as a plain tuple, which every wrapper understands."""
        evaluation = self._evaluate(trajectories, request)
        return (
            evaluation.log_prob,
            evaluation.entropy,
            evaluation.divergence,
            evaluation.prediction,
        )


def evaluate_through(
    module: nn.Module, trajectories: Trajectories, request: Request
) -> Evaluation:
    """Call a (wrapped) :class:`EvaluationModule`."""
    return Evaluation(*module(trajectories, request))
