"""What several processes change: sums over ranks, errors shared, one wrapped call per backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn

from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError, RewardError
from mmgrpo.protocols import Evaluation, Policy, Request

Result = TypeVar("Result")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def make_accelerator(*, idle: bool = False) -> Accelerator:
    """Join the processes of the run, and find its device.

    Precision and accumulation are the run's own matter, whatever the launcher's settings say.

    Args:
        idle: whether a trained parameter may have no gradient on some rank.

    Raises:
        ConfigError: the launcher asks for sharded weights.
    """
    accelerator = Accelerator(
        cpu=torch.backends.mps.is_available(),  # MPS has no float64, which statistics need
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=idle)
        ],
    )
    kind = accelerator.distributed_type
    if kind in SHARDED:
        raise ConfigError(
            f"the launcher asks for {kind.value}, and weights cannot be sharded yet; expected one "
            "process or plain data parallelism (`accelerate launch --multi_gpu`)."
        )
    return accelerator


class RankCollective(Collective):
    """Sums and gathers through accelerate, over the ranks of the run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.size = accelerator.num_processes

    def sum(self, value: Tensor) -> Tensor:
        """Sum ``value`` over ranks."""
        on_device = value.to(self.accelerator.device)
        total: Tensor = self.accelerator.reduce(on_device, reduction="sum")
        return total.to(value.device)

    def gather(self, value: Tensor) -> Tensor:
        """Concatenate the ranks' values, of possibly different length, along dim 0."""
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, value.cpu())
        return torch.cat(parts).to(value.device)


def make_collective(accelerator: Accelerator) -> Collective:
    """Return the collective of this run: the local one for one process."""
    return LOCAL if accelerator.num_processes == 1 else RankCollective(accelerator)


def any_rank(collective: Collective, flag: bool) -> bool:
    """Whether ``flag`` is set on any rank; every rank gets the same answer."""
    return bool(collective.sum(torch.tensor(float(flag))))


def together(collective: Collective, score: Callable[[], Result]) -> Result:
    """Call a reward function on every rank; if it fails on one, fail on all.

    Otherwise the others would wait for ever, and the run could not be saved.

    Raises:
        RewardError: it failed, here or elsewhere.
    """
    result, error = None, None
    try:
        result = score()
    except RewardError as raised:
        error = raised
    failed = any_rank(collective, error is not None)
    if error is not None:
        raise error
    if failed or result is None:
        raise RewardError("a reward failed in another process, which says which one.")
    return result


def anchored(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Tie a loss that does not depend on the weights to all of them, with gradient 0.

    A rank without anything to train has such a loss, and the others wait for its gradients.
    """
    if loss.requires_grad:
        return loss
    return loss + 0.0 * torch.stack([p.sum() for p in parameters.values()]).sum()


class EvaluationModule(nn.Module):
    """A policy's evaluation as one module call, so that DDP sees one forward per backward."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.network = policy.network
        self._evaluate = policy.evaluate

    def forward(self, trajectories: Trajectories, request: Request) -> tuple[Tensor | None, ...]:
        """Return the evaluation's fields as a plain tuple, which every wrapper understands."""
        found = self._evaluate(trajectories, request)
        return found.log_prob, found.entropy, found.divergence, found.prediction


def evaluate_through(module: nn.Module, trajectories: Trajectories, request: Request) -> Evaluation:
    """Call a (wrapped) :class:`EvaluationModule`."""
    return Evaluation(*module(trajectories, request))
