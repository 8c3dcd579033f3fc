"""A next-scale image generator of our own (VAR, arXiv:2404.02905), and its folder.

Shapes: P prompts of up to Lp tokens; B rows of K scales of n_k codes (N in all); D hidden
features, C channels and V entries of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmgrpo.config.scale_shape import FILE, ScaleShape, read_shape
from mmgrpo.errors import ModelError
from mmgrpo.policies.loading import first_line
from mmgrpo.policies.scale_quantiser import ScaleQuantiser

WEIGHTS = "model.safetensors"


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (AdaLN).

    The condition's part is shared by all blocks; each adds an offset of its own.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: int) -> None:
        """Make a block that lets its branches through ungated."""
        super().__init__()
        self.num_heads = num_heads
        self.offset = nn.Parameter(torch.zeros(6, hidden_size))
        with torch.no_grad():
            self.offset[[2, 5]] = 1.0
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.widen = nn.Linear(hidden_size, mlp_ratio * hidden_size)
        self.narrow = nn.Linear(mlp_ratio * hidden_size, hidden_size)

    def forward(self, x: Tensor, seen: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: ``[B, L, D]``.
            seen: bool, broadcasts to ``[B, heads, L, L]``: which places a place looks at.
            modulation: ``[B, 6, D]`` shift, scale and gate of attention and MLP; None: none.
        """
        table = self.offset if modulation is None else self.offset + modulation
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table[..., None, :].unbind(-3)
        x = x + gate_a * self._attend(_norm(x) * (1 + scale_a) + shift_a, seen)
        hidden = F.gelu(self.widen(_norm(x) * (1 + scale_m) + shift_m), approximate="tanh")
        mixed: Tensor = x + gate_m * self.narrow(hidden)
        return mixed

    def _attend(self, x: Tensor, seen: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        projected: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return projected


class ScaleTransformer(nn.Module):
    """Logits of the codes of all scales in one pass; a place sees its own and earlier scales."""

    scale_of: Tensor
    visible: Tensor

    def __init__(self, shape: ScaleShape) -> None:
        """Make an untrained transformer."""
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        sizes = (size, shape.num_heads, shape.mlp_ratio)
        self.prompt_tokens = nn.Embedding(shape.prompt_vocabulary, size)
        self.prompt_places = nn.Embedding(shape.prompt_room, size)
        self.prompt_block = Block(*sizes)
        self.condition = nn.Linear(size, size)
        self.adaptive = nn.Linear(size, 6 * size)
        self.start = nn.Linear(size, size)
        self.features = nn.Linear(shape.code_dim, size)
        self.places = nn.Embedding(shape.room, size)
        self.scales = nn.Embedding(len(shape.scales), size)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(shape.num_layers))
        self.last = nn.Linear(size, 2 * size)
        self.head = nn.Linear(size, shape.num_codes)
        self.checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        lengths = torch.tensor(shape.lengths)
        scale_of = torch.arange(len(lengths)).repeat_interleave(lengths)
        self.register_buffer("scale_of", scale_of, persistent=False)
        visible = scale_of[:, None] >= scale_of
        self.register_buffer("visible", visible, persistent=False)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head, which gets no adapter."""
        return self.head

    def forward(self, ids: Tensor, mask: Tensor, prompt_row: Tensor, features: Tensor) -> Tensor:
        """Return the logits ``[B, L, V]`` of the first L codes, in the weights' dtype.

        Args:
            ids: ``[P, Lp]`` int64, the prompts.
            mask: ``[P, Lp]`` bool, off on the padding.
            prompt_row: ``[B]`` int64, the prompt of each row.
            features: ``[B, L, C]``, see :meth:`ScaleQuantiser.inputs`; whole scales.
        """
        condition = self._read_prompts(ids, mask)[prompt_row]
        length, first = features.shape[1], self.shape.lengths[0]
        place = self.places.weight[:length] + self.scales(self.scale_of[:length])
        x = self.features(features.to(place.dtype)) + place
        start = self.start(condition)[:, None].expand(-1, first, -1)
        x = torch.cat([x[:, :first] + start, x[:, first:]], dim=1)
        modulation = self.adaptive(F.silu(condition)).unflatten(-1, (6, -1))
        seen = self.visible[:length, :length]
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, seen, modulation, use_reentrant=False)
            else:
                x = block(x, seen, modulation)
        shift, scale = self.last(F.silu(condition))[:, None].chunk(2, dim=-1)
        logits: Tensor = self.head(_norm(x) * (1 + scale) + shift)
        return logits

    def _read_prompts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[P, D]``: each prompt as one vector, whatever the padding."""
        place = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        x = self.prompt_tokens(ids) + self.prompt_places(place)
        x = _norm(self.prompt_block(x, mask[:, None, None]))
        weight = mask.to(x.dtype)[..., None]
        found: Tensor = self.condition((x * weight).sum(dim=1) / weight.sum(dim=1))
        return found


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@dataclass(frozen=True)
class ScaleModel:
    """A generator: the transformer that trains, and the frozen quantiser of its pictures."""

    shape: ScaleShape
    transformer: ScaleTransformer
    quantiser: ScaleQuantiser

    @classmethod
    def make(cls, shape: ScaleShape) -> Self:
        """Make an untrained model, its weights from the global generator."""
        return cls(shape, ScaleTransformer(shape), ScaleQuantiser(shape))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load ``config.json`` and ``model.safetensors``, float32, the quantiser frozen.

        Raises:
            ModelError: the folder is missing or incomplete, or its weights do not fit.
        """
        shape, file = read_shape(folder), Path(folder) / WEIGHTS
        try:
            weights = load_file(file)
            with torch.random.fork_rng(devices=[]):  # what is loaded shall draw nothing
                model = cls.make(shape)
            for name, part in _parts(model).items():
                prefix = f"{name}."
                own = {k.removeprefix(prefix): weights.pop(k)
                       for k in [*weights] if k.startswith(prefix)}  # fmt: skip
                part.load_state_dict(own)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"Cannot load the weights {file}: {first_line(error)}") from error
        if weights:
            raise ModelError(
                f"Cannot load the weights {file}: '{min(weights)}' is not in the model."
            )
        model.quantiser.requires_grad_(False).eval()
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what :meth:`from_pretrained` reads; the folder is made if missing."""
        directory = Path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        document = self.shape.model_dump_json(indent=2)
        (directory / FILE).write_text(document + "\n", encoding="utf-8")
        weights = {
            f"{name}.{key}": value.contiguous()
            for name, part in _parts(self).items()
            for key, value in part.state_dict().items()
        }
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def _parts(model: ScaleModel) -> dict[str, nn.Module]:
    return {"transformer": model.transformer, "quantiser": model.quantiser}
