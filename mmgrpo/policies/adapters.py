"""Adapters and second sets of weights, shared by every policy.

LoRA (through peft), the references a policy is held to, and the exponential moving average. A
second set of weights holds the trainable parameters only and is swapped into the one network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError, nearest

ReferenceKind = Literal["auto", "none", "adapter_off", "copy", "ema"]
_UPDATES = "__updates__"


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of everything that trains, in module order."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def has_adapter(network: nn.Module) -> bool:
    """Whether :func:`add_lora` wrapped this network."""
    return hasattr(network, "peft_config")


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    within: nn.Module | None = None,
    init: Literal["default", "gaussian"] = "default",
    seed: int | None = None,
    task_type: str | None = None,
) -> nn.Module:
    """Freeze a module and give its linear layers trainable low-rank updates.

    LoRA, arXiv:2106.09685. There is no dropout: a decision must have the same log-probability when
    it is sampled and when it is trained.

    Args:
        module: the network; changed in place.
        rank: rank of the updates.
        alpha: the update is scaled by ``alpha / rank``.
        targets: names of the linear layers, whole or their last parts; None takes every linear
            layer of ``within`` except the output head.
        within: the part of the module that ``targets=None`` looks at; None is all of it.
        init: ``default`` (Kaiming A, zero B) or ``gaussian`` (normal A, zero B). Either way the
            first output is that of the base.
        seed: seed of the initial A; None draws from the global generator.
        task_type: peft's task type, written into the exported adapter.

    Returns:
        The wrapping ``PeftModel``. Only its adapter weights have ``requires_grad``.

    Raises:
        ConfigError: a rank below 1, an unknown ``init`` or a target that the module lacks.
    """
    from peft import LoraConfig, get_peft_model

    inits: dict[str, bool | str] = {"default": True, "gaussian": "gaussian"}
    if init not in inits:
        raise ConfigError(f"Unknown LoRA init '{init}'{nearest(init, inits)}")
    if rank < 1:
        raise ConfigError(f"The LoRA rank must be at least 1; got {rank}.")
    names = list(targets) if targets is not None else linear_layers(module, within=within)
    _check_targets(module, names)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=names,
        init_lora_weights=inits[init],  # type: ignore[arg-type]
        task_type=task_type,
    )
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return get_peft_model(module, config)  # type: ignore[arg-type]


def linear_layers(module: nn.Module, *, within: nn.Module | None = None) -> list[str]:
    """Name the linear layers of ``within``, without the output head, as briefly as is unambiguous.

    Returns:
        Last parts of the names (``q_proj``) where no layer outside shares them, else whole names.
    """
    inside = set((module if within is None else within).modules())
    head = _output_head(module)
    layers = {name: layer for name, layer in module.named_modules() if _is_linear(layer)}
    chosen = {name for name, layer in layers.items() if layer in inside and layer is not head}
    leaves = {name.rpartition(".")[2] for name in chosen}
    shared = leaves & {name.rpartition(".")[2] for name in layers.keys() - chosen}
    return sorted(chosen if shared else leaves)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _output_head(module: nn.Module) -> nn.Module | None:
    find: Callable[[], nn.Module | None] = getattr(module, "get_output_embeddings", lambda: None)
    return find()


def _check_targets(module: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = {name.rpartition(".")[2] for name, m in module.named_modules() if _is_linear(m)}
            raise ConfigError(
                f"The LoRA target '{target}' is no layer of {type(module).__name__}"
                f"{nearest(target, leaves)}"
            )


class Reference:
    """The weights a policy is held to; this base class is the missing reference."""

    available = False

    def active(self) -> AbstractContextManager[None]:
        """Within the context, the network answers with the reference's weights."""
        raise ConfigError(
            "This method compares with a reference, but the policy was built with reference 'none'; "
            "set it to 'auto', 'adapter_off', 'copy' or 'ema'."
        )

    def update(self) -> None:
        """Follow the network; called after each optimiser step. Only an EMA moves."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors a checkpoint must keep: name -> tensor, flat."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""


class AdapterOff(Reference):
    """The base model under an adapter: costs no memory and never moves."""

    available = True

    def __init__(self, network: nn.Module) -> None:
        if not has_adapter(network):
            raise ConfigError(
                "reference 'adapter_off' needs a LoRA adapter, and this policy has none; "
                "set lora or use reference 'copy'."
            )
        self._network = network

    def active(self) -> AbstractContextManager[None]:
        return self._network.disable_adapter()  # type: ignore[operator,no-any-return]


class FrozenCopy(Reference):
    """The trainable parameters as they were at construction or at the last :meth:`refresh`."""

    available = True

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._values: dict[str, Tensor] = {}
        for name, parameter in trainable_parameters(network).items():
            self._values[name] = parameter.detach().clone()

    def active(self) -> AbstractContextManager[None]:
        return swapped(self._network, self._values)

    def refresh(self) -> None:
        """Move the reference to the present weights."""
        parameters = dict(self._network.named_parameters())
        for name in self._values:
            self._values[name] = parameters[name].detach().clone()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        _check_names(self._values, state)
        self._values = {name: state[name].clone() for name in self._values}


class EmaReference(Reference):
    """An exponential moving average of the trainable parameters; the trainer moves it."""

    available = True

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.ema = Ema(network, decay, warmup=False)

    def active(self) -> AbstractContextManager[None]:
        return self.ema.applied()

    def update(self) -> None:
        self.ema.update()

    def state_dict(self) -> dict[str, Tensor]:
        return self.ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.ema.load_state_dict(state)


_REFERENCES: dict[str, Callable[[nn.Module, float], Reference]] = {
    "none": lambda network, decay: Reference(),
    "adapter_off": lambda network, decay: AdapterOff(network),
    "copy": lambda network, decay: FrozenCopy(network),
    "ema": EmaReference,
    "auto": lambda network, decay: (AdapterOff if has_adapter(network) else FrozenCopy)(network),
}


def make_reference(kind: str, network: nn.Module, *, decay: float = 0.99) -> Reference:
    """Build the reference of a network.

    Args:
        kind: ``none``, ``adapter_off``, ``copy``, ``ema`` or ``auto`` (the adapter switched off
            where there is one, else a frozen copy).
        network: the network, with the parameters that will train already chosen.
        decay: decay per update of ``ema``.

    Raises:
        ConfigError: an unknown kind, or ``adapter_off`` without an adapter.
    """
    if kind not in _REFERENCES:
        raise ConfigError(f"Unknown reference '{kind}'{nearest(kind, _REFERENCES)}")
    return _REFERENCES[kind](network, decay)


class Ema:
    """Float32 exponential moving average of a network's trainable parameters.

    After n updates the decay in force is ``min(decay, (1 + n) / (10 + n))`` with ``warmup``, so that
    a short run is not dominated by its start; without, it is ``decay`` throughout.
    """

    def __init__(self, network: nn.Module, decay: float, *, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"The EMA decay must lie in [0, 1); got {decay}.")
        self._network = network
        self._decay = decay
        self._warmup = warmup
        self._updates = 0
        self._values = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in trainable_parameters(network).items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights; call it once after each optimiser step."""
        warm = (1 + self._updates) / (10 + self._updates) if self._warmup else 1.0
        self._updates += 1
        parameters = dict(self._network.named_parameters())
        for name, value in self._values.items():
            value = self._values[name] = _like(value, parameters[name])
            value.lerp_(parameters[name].float(), 1.0 - min(self._decay, warm))

    def applied(self) -> AbstractContextManager[None]:
        """Within the context, the network has the averaged weights, in its own dtype."""
        return swapped(self._network, self._values)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, float32, and the number of updates: a flat dict of tensors."""
        return {**self._values, _UPDATES: torch.tensor(self._updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        _check_names(self._values, {k: v for k, v in state.items() if k != _UPDATES})
        self._values = {name: state[name].to(torch.float32, copy=True) for name in self._values}
        self._updates = int(state[_UPDATES])


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


def _check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    if own.keys() != given.keys():
        odd = sorted(own.keys() ^ given.keys())[0]
        raise ConfigError(
            f"The saved weights do not fit this network: it trains {len(own)} tensors, the file has "
            f"{len(given)}; '{odd}' is in one of them only."
        )
