"""Any policy, with its weights as the decision: a sample is drawn from perturbed weights.

What is sampled is one Gaussian step theta + scale xi in weight space per sample, so that methods
which only rank or score candidates (evolution strategies, zeroth-order search) are policy gradients
on that one decision, and no network has to be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mmgrpo.core.seeding import generator
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.policies.weights import swapped, trainable_parameters
from mmgrpo.protocols import Evaluation, Policy, Request

_PLAIN = Request()


@dataclass(frozen=True)
class PerturbationPayload:
    """Which perturbation each row was drawn with: ``names [B, 2]`` int64 (seed, member)."""

    names: Tensor

    def select(self, rows: Tensor) -> Self:
        """Return the given rows."""
        return replace(self, names=self.names[rows])

    def to(self, device: torch.device) -> Self:
        """Return a copy on ``device``."""
        return replace(self, names=self.names.to(device))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join."""
        return replace(parts[0], names=torch.cat([part.names for part in parts]))


class PerturbedPolicy:
    """A policy whose log-probability is that of a perturbation of its trainable weights.

    ``log_prob [B, 1]`` is <theta, xi>: the Gaussian's log-density up to a constant and to the
    factor 1/scale, with gradient xi. Everything else is the inner policy's.

    Args:
        inner: the policy that generates.
        scale: standard deviation of the perturbation.
    """

    if TYPE_CHECKING:
        modality: str
        network: torch.nn.Module
        forwards: int

    def __init__(self, inner: Policy, scale: float) -> None:
        self.inner = inner
        self.scale = scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def perturbed(self, seed: int, member: int) -> AbstractContextManager[None]:
        """Within the context, the weights are theta + scale xi(seed, member)."""
        parameters = trainable_parameters(self.network)
        values = {
            name: p.detach().float() + self.scale * noise
            for (name, p), noise in zip(parameters.items(), self._noise(seed, member), strict=True)
        }
        return swapped(self.network, values)

    def evaluate(self, trajectories: Trajectories, request: Request = _PLAIN) -> Evaluation:
        """Return <theta, xi> of every row, differentiable; ``request`` adds nothing to it."""
        del request
        names: Tensor = trajectories.payload.names
        distinct, row = torch.unique(names, dim=0, return_inverse=True)
        products = torch.stack([self._product(*name) for name in distinct.tolist()])
        return Evaluation(log_prob=products[row][:, None] * trajectories.mask)

    def _product(self, seed: int, member: int) -> Tensor:
        parameters = trainable_parameters(self.network).values()
        parts = zip(parameters, self._noise(seed, member), strict=True)
        return torch.stack([(p.float() * noise).sum() for p, noise in parts]).sum()

    def _noise(self, seed: int, member: int) -> list[Tensor]:
        """A standard normal tensor for each trainable parameter, in their order."""
        return [
            torch.randn(p.shape, generator=generator(seed, member, place)).to(p.device)
            for place, p in enumerate(trainable_parameters(self.network).values())
        ]
