"""How clean samples are noised, what the network predicts, and which kernels undo it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mmgrpo.core.diffusion.gaussian import align
from mmgrpo.core.diffusion.kernels import KERNELS, signal_power

AUTO = "auto"
"""Stands for the stochastic kernel of whatever process the model was trained on."""


@dataclass(frozen=True)
class Process:
    """The noising ``x_sigma = alpha x0 + sigma e`` that a model was trained to undo.

    Attributes:
        name: how errors call its models.
        signal: alpha as a function of sigma.
        prediction: (clean, noise) -> what the network predicts.
        stochastic: step kernel of rollouts that name none.
        deterministic: step kernel without noise.
    """

    name: str
    signal: Callable[[Tensor], Tensor]
    prediction: Callable[[Tensor, Tensor], Tensor]
    stochastic: str
    deterministic: str

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return ``[N, ...]``: ``clean`` at noise levels ``[N]`` (or ``[]``)."""
        level = align(sigma, clean)
        return self.signal(level) * clean + level * noise

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the step kernels that follow the process."""
        return tuple(n for n, kernel in KERNELS.items() if kernel.still == self.deterministic)

    def kernel(self, name: str) -> str:
        """Return the kernel that ``name`` means here: ``auto`` and ``ode`` mean the process's own.

        Raises:
            ValueError: the kernel is unknown or follows another process.
        """
        chosen = {AUTO: self.stochastic, "ode": self.deterministic}.get(name, name)
        if chosen not in self.kernels:
            raise ValueError(
                f"step kernel '{name}' does not fit {self.name}; valid: "
                f"{', '.join((AUTO, *self.kernels))}."
            )
        return chosen


FLOW = Process(
    name="a flow model",
    signal=lambda sigma: 1 - sigma,
    prediction=lambda clean, noise: noise - clean,
    stochastic="flow_sde",
    deterministic="ode",
)
"""Rectified flow: ``(1 - sigma) x0 + sigma e``; the network predicts the velocity ``e - x0``."""

DIFFUSION = Process(
    name="a diffusion model",
    signal=lambda sigma: signal_power(sigma).sqrt(),
    prediction=lambda clean, noise: noise,
    stochastic="ddim_eta",
    deterministic="ddim",
)
"""Variance preserving: ``sqrt(1 - sigma^2) x0 + sigma e``; the network predicts the noise e."""
