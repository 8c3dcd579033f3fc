"""Adapters and references, shared by every policy: LoRA (through peft), and what holds it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError, MissingExtraError, nearest
from mmgrpo.policies.weights import Ema, check_names, swapped, trainable_parameters

__all__ = [
    "AdapterOff",
    "Ema",
    "EmaReference",
    "FrozenCopy",
    "Reference",
    "add_lora",
    "has_adapter",
    "linear_layers",
    "make_reference",
    "trainable_parameters",
]

_INITS: dict[str, bool | str] = {"default": True, "gaussian": "gaussian"}


def has_adapter(network: nn.Module) -> bool:
    """Whether :func:`add_lora` wrapped this network."""
    return hasattr(network, "disable_adapter")


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    within: nn.Module | None = None,
    init: Literal["default", "gaussian"] = "default",
    seed: int | None = None,
    task_type: str | None = None,
) -> nn.Module:
    """Freeze a module and give its linear layers trainable low-rank updates.

    LoRA, arXiv:2106.09685.

    Args:
        module: the network; changed in place.
        rank: rank of the updates.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: must be 0: a decision has the same log-probability when it is sampled and trained.
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
        ConfigError: an option out of its range, or a target that the module lacks.
        MissingExtraError: peft is not installed.
    """
    names = list(targets) if targets is not None else linear_layers(module, within=within)
    _check_lora(module, names, rank=rank, dropout=dropout, init=init)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "lora") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=names,
        init_lora_weights=_INITS[init],
        task_type=task_type,
    )
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return get_peft_model(module, config)


def linear_layers(module: nn.Module, *, within: nn.Module | None = None) -> list[str]:
    """Name the linear layers of ``within``, without the output head, as briefly as is unambiguous.

    Returns:
        Last parts of the names (``q_proj``) where no other module shares them, else whole names.
    """
    inside = set((module if within is None else within).modules())
    head = _output_head(module)
    names = {name: part for name, part in module.named_modules() if name}
    chosen = {name for name, part in names.items() if _is_linear(part) and part in inside - {head}}
    leaves = {name.rpartition(".")[2] for name in chosen}
    others = {name.rpartition(".")[2] for name in names.keys() - chosen}
    return sorted(chosen if leaves & others else leaves)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _output_head(module: nn.Module) -> nn.Module | None:
    find: Callable[[], nn.Module | None] = getattr(module, "get_output_embeddings", lambda: None)
    return find()


def _check_lora(
    module: nn.Module, targets: Sequence[str], *, rank: int, dropout: float, init: str
) -> None:
    if rank < 1:
        raise ConfigError(f"The LoRA rank must be at least 1; got {rank}.")
    if dropout:
        raise ConfigError(
            f"The LoRA dropout must be 0; got {dropout}: with dropout, a decision would not have "
            "the log-probability that it was sampled with."
        )
    if init not in _INITS:
        raise ConfigError(f"Unknown LoRA init '{init}'{nearest(init, _INITS)}")
    layers = [name for name, layer in module.named_modules() if name and _is_linear(layer)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ConfigError(
                f"The LoRA target '{target}' is no linear layer of {type(module).__name__}"
                f"{nearest(target, {name.rpartition('.')[2] for name in layers})}"
            )


class Reference:
    """The weights a policy is held to; this base class is the missing reference."""

    available = False

    def active(self) -> AbstractContextManager[None]:
        """Within the context, the network answers with the reference's weights."""
        raise ConfigError(
            "The method compares with a reference, and the policy was built with reference 'none'; "
            "use 'auto', 'adapter_off', 'copy' or 'ema'."
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
        """Switch the adapter off."""
        return self._network.disable_adapter()  # type: ignore[operator]


class FrozenCopy(Reference):
    """The trainable parameters as they were at construction or at the last :meth:`refresh`."""

    available = True

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._values: dict[str, Tensor] = {}
        for name, parameter in trainable_parameters(network).items():
            self._values[name] = parameter.detach().clone()

    def active(self) -> AbstractContextManager[None]:
        """Swap the copy in."""
        return swapped(self._network, self._values)

    def refresh(self) -> None:
        """Move the reference to the present weights."""
        parameters = dict(self._network.named_parameters())
        for name in self._values:
            self._values[name] = parameters[name].detach().clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copy."""
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the copy."""
        check_names(self._values, state)
        self._values = {name: state[name].clone() for name in self._values}


class EmaReference(Reference):
    """An exponential moving average of the trainable parameters; the trainer moves it."""

    available = True

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.ema = Ema(network, decay, warmup=False)

    def active(self) -> AbstractContextManager[None]:
        """Swap the average in."""
        return self.ema.applied()

    def update(self) -> None:
        """Take in the present weights."""
        self.ema.update()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average."""
        return self.ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the average."""
        self.ema.load_state_dict(state)


_REFERENCES: dict[str, Callable[[nn.Module, float], Reference]] = {
    "none": lambda _, __: Reference(),
    "adapter_off": lambda network, _: AdapterOff(network),
    "copy": lambda network, _: FrozenCopy(network),
    "ema": EmaReference,
    "auto": lambda network, _: (AdapterOff if has_adapter(network) else FrozenCopy)(network),
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
