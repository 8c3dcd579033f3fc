"""Sizes of a language model's layers: ``config.json`` in its folder, read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "config.json"
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "inner": ("intermediate_size", "n_inner", "mlp_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_width": ("head_dim",),
    "vocabulary": ("vocab_size",),
}
_NEEDED = ("layers", "hidden", "heads", "vocabulary")
_SPARSE = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class LayerShape:
    """A dense transformer.

    Attributes:
        layers: how many.
        hidden: features of the residual stream.
        inner: features inside the MLP.
        queries: features of all queries together.
        keys: features of all keys together; as many of all values.
        vocabulary: tokens that the output head knows.
    """

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Weights of the layers, with a gated MLP, the embedding and the output head."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        layer = attention + 3 * self.hidden * self.inner
        return self.layers * layer + 2 * self.vocabulary * self.hidden


def layer_shape(config: Mapping[str, Any]) -> LayerShape | None:
    """Return the shape in a transformers configuration, None where it does not say all of it.

    The language model's part of a multimodal configuration is read; a mixture of experts has none.
    """
    part = config.get("text_config")
    config = part if isinstance(part, Mapping) else config
    if any(config.get(name) for name in _SPARSE):
        return None
    found = {key: _first(config, names) for key, names in _NAMES.items()}
    if any(found[key] == 0 for key in _NEEDED):
        return None
    width = found["head_width"] or found["hidden"] // found["heads"]
    return LayerShape(
        layers=found["layers"],
        hidden=found["hidden"],
        inner=found["inner"] or 4 * found["hidden"],
        queries=width * found["heads"],
        keys=width * (found["key_heads"] or found["heads"]),
        vocabulary=found["vocabulary"],
    )


def _first(config: Mapping[str, Any], names: Sequence[str]) -> int:
    """Return the value of the first name that has a number, 0 if none has."""
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)


def read_layer_shape(folder: str | Path) -> LayerShape | None:
    """Return the shape of the model in a local folder, None where the folder does not say it."""
    file = Path(folder) / FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return layer_shape(config) if isinstance(config, Mapping) else None
