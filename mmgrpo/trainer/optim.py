"""The optimiser, and a learning rate that is a pure function of the number of updates done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW (arXiv:1711.05101) with a float32 master behind every parameter of lower precision.

    bfloat16 has eight bits: an update below 0.4 % of a weight, which is every update at the usual
    learning rates, would be rounded away. The masters take it, and the network gets them rounded.

    Args:
        parameters: name -> parameter to train, in a fixed order.
        betas: decay rates of the two moments.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: Sequence[float],
        weight_decay: float,
    ) -> None:
        self.parameters = dict(parameters)
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        beta1, beta2 = betas
        self._adam = torch.optim.AdamW(
            self._masters.values(), betas=(beta1, beta2), weight_decay=weight_decay
        )

    def step(self, learning_rate: float) -> None:
        """Apply the gradients of the parameters, and drop them."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        for parameter, master in self._lower_precision():
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._round()

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights and moments as flat ``<kind>/<parameter>`` tensors."""
        state = {f"weight/{name}": p.detach() for name, p in self._masters.items()}
        for name, master in self._masters.items():
            for kind, value in self._adam.state.get(master, {}).items():
                state[f"{kind}/{name}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, into the parameters too."""
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            moments.setdefault(name, {})[kind] = value
        for name, master in self._masters.items():
            with torch.no_grad():
                master.copy_(moments[name].pop("weight"))
            if moments[name]:
                self._adam.state[master] = {
                    # the step count stays on the CPU, where AdamW keeps it
                    kind: value.clone() if kind == "step" else value.to(master.device, copy=True)
                    for kind, value in moments[name].items()
                }
        self._round()

    def _lower_precision(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = zip(self.parameters.values(), self._masters.values(), strict=True)
        return [(parameter, master) for parameter, master in pairs if parameter is not master]

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in self._lower_precision():
            parameter.copy_(master)


def _constant(progress: float) -> float:
    del progress
    return 1.0


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
"""Name -> factor as a function of the progress after the warm-up, 0 to 1."""


def learning_rate_at(update: int, *, base: float, schedule: str, warmup: int, total: int) -> float:
    """Return the learning rate of an update.

    Args:
        update: its number, from 0.
        base: the configured learning rate.
        schedule: a name of ``SCHEDULES``.
        warmup: updates during which the rate rises linearly to ``base``.
        total: updates of the whole run.
    """
    if update < warmup:
        return base * (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, total - warmup)
    return base * SCHEDULES[schedule](progress)
