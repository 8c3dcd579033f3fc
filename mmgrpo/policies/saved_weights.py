"""Reading back the weights that a policy exported: an adapter where it has one, else all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from mmgrpo.errors import ModelError
from mmgrpo.policies.adapters import has_adapter
from mmgrpo.policies.loading import first_line


def load_saved(network: nn.Module, directory: Path, load_all: Callable[[Path], None]) -> None:
    """Load the weights in a folder into the present tensors.

    Args:
        network: what trains, with or without an adapter.
        directory: the folder; it holds the adapter alone where the network has one.
        load_all: loads every weight from the folder, for a network without an adapter.

    Raises:
        ModelError: the folder is missing, or holds weights that do not fit.
    """
    if not directory.is_dir():
        raise ModelError(f"The folder {directory} with the saved weights does not exist.")
    try:
        if has_adapter(network):
            _load_adapter(network, directory)
        else:
            load_all(directory)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"The weights in {directory} do not fit this model: {first_line(error)}"
        ) from error


def _load_adapter(network: nn.Module, directory: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    device = next(network.parameters()).device
    weights = load_peft_weights(str(directory), device=str(device))
    result = set_peft_model_state_dict(network, weights)
    if result.unexpected_keys:
        raise ValueError(f"'{result.unexpected_keys[0]}' is not in the model")
