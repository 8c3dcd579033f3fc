"""How the stochastic steps of a rollout are sampled and scored, as one value to store."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmgrpo.core.diffusion.divergence import step_divergence
from mmgrpo.core.diffusion.gaussian import StepOutput
from mmgrpo.core.diffusion.kernels import step


@dataclass(frozen=True)
class StepRule:
    """A step kernel with its numbers; the rollout and every evaluation go through it.

    Attributes:
        kernel: name of the step kernel.
        eta: its noise scale.
        sigma_max: second entry of the schedule, see :func:`mmgrpo.core.diffusion.step`.
        reduce: ``mean`` or ``sum`` of the log-density over the latent elements.
    """

    kernel: str
    eta: float
    sigma_max: float
    reduce: str = "mean"

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
