"""Evaluate the decisions that count, and no others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MethodError
from mmgrpo.policies.token_logits import TokenReading
from mmgrpo.policies.token_payload import TokenPayload, pad_right
from mmgrpo.protocols import Evaluation, Request

PLAIN_REQUEST = Request()

Read = Callable[[TokenPayload, Tensor, bool], TokenReading]
"""From rows, ``[R, W]`` bool decisions and whether to return entropies to ``[R, W]`` results."""


def refuse_predictions(request: Request) -> None:
    """Refuse what needs the predictions of a flow.

    Raises:
        MethodError: a divergence or a prediction is requested.
    """
    if request.divergence or request.prediction:
        raise MethodError(
            "A token policy stores no predictions to measure a divergence from; estimate the KL "
            "from log-probabilities (k1, k2 or k3)."
        )


def evaluate_used(trajectories: Trajectories, request: Request, read: Read) -> Evaluation:
    """Read the rows and columns that count, and place the results in ``[B, T]``."""
    refuse_predictions(request)
    mask = trajectories.mask
    used = mask.any(dim=1)
    used[0] |= ~used.any()  # the network runs even if nothing counts: other ranks wait for it
    rows = used.nonzero().squeeze(1)
    width = int((mask.any(dim=0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max())
    keep = mask[rows, : max(width, 1)]
    reading = read(trajectories.payload.select(rows), keep, request.entropy)

    def place(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).index_put((rows,), pad_right(values, mask.shape[1]))

    return Evaluation(
        log_prob=place(reading.log_prob),
        entropy=None if reading.entropy is None else place(reading.entropy),
    )
