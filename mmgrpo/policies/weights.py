"""A second set of weights: the trainable parameters only, swapped into the one network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError

_UPDATES = "__updates__"


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of everything that trains, in module order."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


class Ema:
    """Float32 exponential moving average of a network's trainable parameters.

    ``decay`` may be a function of the number of updates, the present one counted. With ``warmup``,
    a number is the limit: the decay of the n-th update is ``min(decay, n / (9 + n))``, so that a
    short run is not dominated by its start; without, it is ``decay`` throughout.
    """

    def __init__(
        self, network: nn.Module, decay: float | Callable[[int], float], *, warmup: bool = True
    ) -> None:
        self._network = network
        self._decay = decay if callable(decay) else _steady(decay, warmup)
        self._updates = 0
        self._values = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in trainable_parameters(network).items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights; call it once after each optimiser step."""
        self._updates += 1
        decay = self._decay(self._updates)
        parameters = dict(self._network.named_parameters())
        for name in self._values:
            value = _like(self._values[name], parameters[name])
            self._values[name] = value.lerp_(parameters[name].float(), 1 - decay)

    def applied(self) -> AbstractContextManager[None]:
        """Within the context, the network has the averaged weights, in its own dtype."""
        return swapped(self._network, self._values)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, float32, and the number of updates: a flat dict of tensors."""
        return {**self._values, _UPDATES: torch.tensor(self._updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_names(self._values, {k: v for k, v in state.items() if k != _UPDATES})
        self._values = {name: state[name].to(torch.float32, copy=True) for name in self._values}
        self._updates = int(state[_UPDATES])


def _steady(decay: float, warmup: bool) -> Callable[[int], float]:
    if not 0.0 <= decay < 1.0:
        raise ConfigError(f"The EMA decay must lie in [0, 1); got {decay}.")
    return lambda updates: min(decay, updates / (9 + updates)) if warmup else decay


@contextmanager
def swapped(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, the named parameters of the network have other values.

    Storage is exchanged, not copied, and put back on the way out, also after an exception.
    """
    parameters = dict(network.named_parameters())
    live: dict[str, Tensor] = {}
    try:
        for name, value in values.items():
            live[name] = _put(parameters[name], value)
        yield
    finally:
        for name, value in live.items():
            _put(parameters[name], value)


def _put(parameter: nn.Parameter, value: Tensor) -> Tensor:
    value = _like(value, parameter).to(parameter.dtype)
    if hasattr(parameter, "device_mesh"):  # FSDP2 keeps its own view of the shard's storage
        with torch.no_grad():
            previous = parameter.detach().clone()
            parameter.copy_(value)
        return previous
    previous = parameter.data
    parameter.data = value
    return previous


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the value where the parameter lives, sharded as it is."""
    if hasattr(parameter, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return value.to(parameter.device)


def check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse saved weights that are not those of the same network.

    Raises:
        ConfigError: the names differ.
    """
    if own.keys() != given.keys():
        odd = min(own.keys() ^ given.keys())
        raise ConfigError(
            f"The saved weights do not fit this network: it trains {len(own)} tensors, and "
            f"{len(given)} were saved; '{odd}' is in one of them only."
        )
