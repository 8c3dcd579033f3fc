"""What a flow policy leaves behind: a pipeline folder, or an adapter for peft and diffusers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mmgrpo.policies.adapters import has_adapter
from mmgrpo.policies.saved_weights import load_saved

_PEFT_PREFIX = "base_model.model."


def save_weights(pipe: Any, network: nn.Module, directory: Path, *, denoiser: str) -> None:
    """Write the folder; ``denoiser`` is the network's name in the pipeline.

    Without an adapter it is a whole pipeline (``DiffusionPipeline.from_pretrained``). With one it
    holds the adapter twice, as peft loads it (``PeftModel.from_pretrained``) and as diffusers does
    (``pipe.load_lora_weights``); both carry the scale.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not has_adapter(network):
        pipe.save_pretrained(directory)
        return
    from peft import get_peft_model_state_dict

    network.save_pretrained(directory)  # type: ignore[operator]
    weights = get_peft_model_state_dict(network)
    config = network.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
    layers = {
        name.removeprefix(_PEFT_PREFIX): value.contiguous() for name, value in weights.items()
    }
    pipe.save_lora_weights(
        directory,
        **{f"{denoiser}_lora_layers": layers},
        save_function=partial(_save_for_diffusers, config=config, denoiser=denoiser),
    )


def _save_for_diffusers(
    weights: dict[str, Tensor], filename: str, *, config: dict[str, Any], denoiser: str
) -> None:
    """Write equal weights as equal bytes.

    Diffusers itself lists sets in the order of the process's hashes, and adds a second entry to the
    metadata, which safetensors writes in a random order.
    """
    options = {f"{denoiser}.{name}": _sorted(value) for name, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(options, indent=2, sort_keys=True)}
    save_file(weights, filename, metadata=metadata)


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def load_weights(network: nn.Module, directory: Path, *, denoiser: str) -> None:
    """Load what :func:`save_weights` wrote into the present tensors.

    Raises:
        ModelError: the folder is missing, or holds weights that do not fit.
    """
    load_saved(network, directory, partial(_load_all, network, denoiser))


def _load_all(network: nn.Module, denoiser: str, directory: Path) -> None:
    loaded = type(network).from_pretrained(  # type: ignore[attr-defined]
        directory, subfolder=denoiser, dtype=next(network.parameters()).dtype
    )
    network.load_state_dict(loaded.state_dict())
