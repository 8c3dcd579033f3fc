"""How the stochastic steps of a rollout are sampled and scored, as one value to store."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmgrpo.core.diffusion.divergence import step_divergence
from mmgrpo.core.diffusion.gaussian import StepOutput
from mmgrpo.core.diffusion.kernels import KERNELS, step


@dataclass(frozen=True)
class StepRule:
    """A step kernel with its numbers; the rollout and every evaluation go through it.

    Attributes:
        kernel: name of the step kernel.
        eta: its noise scale; a tensor ``[N]`` has one for each of the steps at hand.
        sigma_max: second entry of the schedule, see :func:`mmgrpo.core.diffusion.step`.
        reduce: ``mean`` or ``sum`` of the log-density over the latent elements.
        levels: eta of each step of the schedule, where they differ.
    """

    kernel: str
    eta: float | Tensor
    sigma_max: float
    reduce: str = "mean"
    levels: tuple[float, ...] = ()

    @property
    def still(self) -> StepRule:
        """The rule of the steps that draw no noise."""
        return replace(self, kernel=KERNELS[self.kernel].still, eta=0.0)

    @property
    def is_still(self) -> bool:
        """Whether no step draws noise."""
        return self.kernel == KERNELS[self.kernel].still or bool(self.eta == 0)

    def growing(self, growth: float, stochastic: Tensor) -> StepRule:
        """Let the noise grow over the d stochastic steps: eta_k = eta (1 + growth k / d).

        k counts from 0, so the first has eta itself (Dynamic-TreeRPO, arXiv:2509.23352).

        Args:
            growth: beta; 0 returns the rule as it is.
            stochastic: ``[T]`` bool, steps that draw noise.
        """
        if not growth or not stochastic.any():
            return self
        passed = stochastic.cumsum(0) - 1
        share = passed.double() / stochastic.sum() * stochastic
        return replace(self, levels=tuple((self.eta * (1 + growth * share)).tolist()))

    def at(self, index: Tensor | int) -> StepRule:
        """Return the rule of the given steps, ``[N]`` or one; the same where all have one eta."""
        if not self.levels:
            return self
        place = torch.as_tensor(index)
        eta = torch.tensor(self.levels, device=place.device)[place]
        return replace(self, eta=eta, levels=())

    def step(
        self,
        velocity: Tensor,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        noise: Tensor | None = None,
        x_next: Tensor | None = None,
    ) -> StepOutput:
        """Take a step with ``noise``, or evaluate the one that led to ``x_next``."""
        return step(
            self.kernel,
            velocity,
            x,
            sigma,
            sigma_next,
            eta=self.eta,
            sigma_max=self.sigma_max,
            noise=noise,
            x_next=x_next,
            reduce=self.reduce,
        )

    def divergence(
        self, kind: str, velocity: Tensor, other: Tensor, sigma: Tensor, sigma_next: Tensor
    ) -> Tensor:
        """Return ``[B]``, see :func:`mmgrpo.core.diffusion.step_divergence`."""
        return step_divergence(
            kind,
            velocity,
            other,
            sigma,
            sigma_next,
            kernel=self.kernel,
            eta=self.eta,
            sigma_max=self.sigma_max,
            reduce=self.reduce,
        )
