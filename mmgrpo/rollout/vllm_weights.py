"""The weights that an engine shall hold, and a digest of them that both ends compute.

Both are named as in the checkpoint: all tensors of the model, or those of its adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_STRIDE = 0x1E3779B97F4A7C15


@dataclass(frozen=True)
class Stamp:
    """What a worker says that it holds.

    Attributes:
        version: number of the update that the weights come from.
        digest: see :func:`digest`; empty before the first synchronisation and after a broken one.
        adapter: name of the adapter, empty where all weights were replaced.
        error: why the last synchronisation broke.
    """

    version: int = -1
    digest: str = ""
    adapter: str = ""
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what passes through JSON."""
        return asdict(self)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of names, dtypes, shapes and every bit of the values, as hex.

    A tensor's part is the sum of its words, as integers, each times an odd number that depends on
    its place, modulo 2^64: exact, the same on every device and in any order of summation. It
    guards against incomplete and mixed-up weights, not against an adversary.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        line = (name, str(tensor.dtype), list(tensor.shape), _checksum(tensor))
        total.update(json.dumps(line).encode())
    return total.hexdigest()


def _checksum(tensor: Tensor) -> int:
    words = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        place = torch.arange(start, start + len(chunk), device=words.device)
        total += (chunk * ((place * _STRIDE) | 1)).sum()
    return int(total)


def model_weights(model: Any) -> dict[str, Tensor]:
    """All weights of a transformers model under the names of its checkpoint, tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: value.detach() for name, value in model.state_dict().items()}
    state = remove_tied_weights_from_state_dict(state, model)
    found: dict[str, Tensor] = revert_weight_conversion(model, state)
    return found


def adapter_weights(network: Any) -> dict[str, Tensor]:
    """The adapter of a network that peft wraps, under the names of its file."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    return {name: value.detach() for name, value in state.items()}


def write_weights(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, under its name only when it is complete."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, part)
    part.replace(file)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read what :func:`write_weights` wrote."""
    from safetensors.torch import load_file

    return load_file(file)
