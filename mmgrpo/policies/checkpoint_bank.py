"""A reference that is an earlier state of the policy itself, drawn from a few that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mmgrpo.core.seeding import mix_seed
from mmgrpo.errors import ConfigError
from mmgrpo.policies.adapters import Reference
from mmgrpo.policies.weights import check_names, swapped, trainable_parameters

_UPDATES = "__updates__"
_STREAM = 0x62616E6B
"""First part of the choice's stream names."""


class CheckpointBank(Reference):
    """The newest ``size`` states of the trainable weights, one saved every ``every`` updates.

    Between two updates one of them, any with the same probability, is the reference (random
    checkpoint replay of SePPO, arXiv:2410.05255). The initial weights are the first. Each kept
    state costs the memory of the trainable weights, so this suits adapters.
    """

    available = True

    def __init__(
        self, network: nn.Module, *, size: int = 7, every: int = 30, seed: int = 0
    ) -> None:
        """Keep the present weights as the first state.

        Args:
            network: the network, with the parameters that train already chosen.
            size: states kept; the oldest goes first.
            every: updates between two states.
            seed: names the stream that the choice is drawn from.

        Raises:
            ConfigError: ``size`` or ``every`` below 1.
        """
        if size < 1 or every < 1:
            raise ConfigError(
                f"A bank keeps at least 1 state, every 1 update or more; got {size} and {every}."
            )
        self._network = network
        self._size, self._every, self._seed = size, every, seed
        self._updates = 0
        self._saved = [_copy(trainable_parameters(network))]

    def __len__(self) -> int:
        return len(self._saved)

    @property
    def index(self) -> int:
        """Which of the kept states, oldest first, is the reference now."""
        return mix_seed(_STREAM, self._seed, self._updates) % len(self._saved)

    def active(self) -> AbstractContextManager[None]:
        """Swap the chosen state in."""
        return swapped(self._network, self._saved[self.index])

    @torch.no_grad()
    def update(self) -> None:
        """Count an update: save the weights when it is time, and choose again."""
        self._updates += 1
        if self._updates % self._every == 0:
            parameters = dict(self._network.named_parameters())
            present = _copy({name: parameters[name] for name in self._saved[0]})
            self._saved = [*self._saved, present][-self._size :]

    def state_dict(self) -> dict[str, Tensor]:
        """Return all kept states, named ``number/name``, and the number of updates."""
        flat = {
            f"{k}/{name}": v for k, state in enumerate(self._saved) for name, v in state.items()
        }
        return {**flat, _UPDATES: torch.tensor(self._updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: the weights are those of another network.
        """
        saved: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            number, _, name = key.partition("/")
            if key != _UPDATES:
                saved.setdefault(int(number), {})[name] = value.clone()
        for kept in saved.values() or [{}]:
            check_names(self._saved[0], kept)
        self._saved = [saved[number] for number in sorted(saved)]
        self._updates = int(state[_UPDATES])


def _copy(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
