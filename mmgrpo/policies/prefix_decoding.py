"""Decoding with shared prompts, for the models whose layers are those of Llama and Qwen.

The layers' own modules (projections, adapters in them, norms) are called; the attention between
them is that of :mod:`mmgrpo.policies.prefix_cache`, and what transformers does around them in every
step (masks, cache objects, positions) is done once or not at all.

Shapes: r rows, H heads of queries, K heads of keys, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from mmgrpo.policies.decoding import TokenState
from mmgrpo.policies.prefix_cache import PrefixCache

LAYERS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2VLDecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3VLTextDecoderLayer",
)
"""Layers of transformers that :class:`PrefixState` reproduces."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on a token's position alone, not on the longest row."""
AHEAD = 32
"""Positions whose rotations are computed at once."""


def can_share(model: Any) -> bool:
    """Whether a model has only layers of a known kind, which attend to all tokens before."""
    decoder, config = model.get_decoder(), model.config.get_text_config()
    layers = getattr(decoder, "layers", ())
    rotary = getattr(decoder, "rotary_emb", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        len(layers) > 0
        and all(type(layer).__name__ in LAYERS for layer in layers)
        and kinds == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and getattr(rotary, "rope_type", None) in ROPE_TYPES
    )


def has_whole_weights(model: Any) -> bool:
    """Whether the weights lie in the modules as they are, not in shards on several devices."""
    weights = model.get_decoder().layers[0].parameters()
    return not any(hasattr(weight, "full_tensor") or weight.numel() == 0 for weight in weights)


class PrefixState:
    """Like :class:`TokenState`; not for gradients, and its prompts are never fanned out.

    Attributes:
        logits: ``[r, V]`` as the model gives them.
    """

    def __init__(self, model: Any, state: TokenState, count: Callable[[], None]) -> None:
        """Take over the result of a prefill.

        Args:
            model: a model that :func:`can_share`.
            state: what stands behind the prompts, one row each.
            count: called for each network call.
        """
        self._decoder, self._head, self._count = model.get_decoder(), model.get_output_embeddings(), count
        layers = [(layer.keys, layer.values) for layer in state.cache.layers]
        self._cache = PrefixCache(layers, state.mask)
        self._axes = state.axes
        self._next = state.next
        self.logits = state.logits
        self._rotations: list[tuple[Tensor, Tensor]] = []

    def select(self, rows: Tensor) -> None:
        """Keep the given rows; repeats fan a prompt out to its group."""
        self._cache.select(rows)
        self._next = self._next[rows]
        self.logits = self.logits[rows]
        self._rotations = []

    def join(self, other: PrefixState) -> bool:
        """Take over the rows of another state, below the present ones."""
        self._cache.join(other._cache)
        self._next = torch.cat([self._next, other._next])
        self.logits = torch.cat([self.logits, other.logits])
        self._rotations = []
        return True

    def advance(self, tokens: Tensor) -> Tensor:
        """Read ``[r, 1]`` tokens; return the ``[r, V]`` logits of what follows."""
        self._count()
        x = self._decoder.embed_tokens(tokens[:, 0])
        if not self._rotations:
            self._rotations = self._rotate_ahead(x)
        rotation = self._rotations.pop()
        self._cache.open()
        for number, layer in enumerate(self._decoder.layers):
            h = _norm(layer.input_layernorm, x)
            x = x + self._attend(number, layer.self_attn, h, rotation)
            x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
        self._next = self._next + 1
        self.logits = self._head(_norm(self._decoder.norm, x))
        return self.logits

    def _rotate_ahead(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``[r, H + K, D]`` factors of the next tokens' rotations, last first, with the scale."""
        attn = self._decoder.layers[0].self_attn
        steps = self._next[:, None] + torch.arange(AHEAD, device=x.device)
        cos, sin = self._decoder.rotary_emb(x[:, None], steps.expand(*self._axes, *steps.shape))
        if cos.dim() == 4:  # one for each axis, which are equal behind a prompt
            cos, sin = cos[0], sin[0]
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        groups = attn.num_key_value_groups
        keys = self._cache.heads
        scale = cos.new_ones(keys * (groups + 1), 1)
        scale[: keys * groups] = attn.scaling
        ahead = [(c[:, None] * scale, s[:, None] * scale) for c, s in zip(cos.unbind(1), sin.unbind(1))]
        return ahead[::-1]

    def _attend(
        self, number: int, attn: Any, h: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        size = attn.head_dim
        queries, keys, values = (
            project(h).unflatten(-1, (-1, size))
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        if hasattr(attn, "q_norm"):
            queries, keys = _norm(attn.q_norm, queries), _norm(attn.k_norm, keys)
        both = torch.cat([queries, keys], dim=1)
        cos, sin = rotation
        both = torch.addcmul(both * cos, both.roll(size // 2, dims=-1), sin)
        queries, keys = both.split((queries.shape[1], keys.shape[1]), dim=1)
        return attn.o_proj(self._cache.attend(number, queries, keys, values))


def try_state(
    begin: Callable[[], TokenState | PrefixState], rows: Tensor, tokens: Tensor
) -> Tensor:
    """Return the ``[N, V]`` log-probabilities met by rows that write, leave, and come later.

    Args:
        begin: reads the prompts.
        rows: ``[R]`` prompt of each row.
        tokens: ``[R, T]`` what to write, T at least 3.
    """
    state, later = begin(), begin()
    for one in (state, later):
        one.select(rows)
    found = [state.logits]
    found += [state.advance(tokens[:, place, None]) for place in (0, 1)]
    state.select(rows.new_tensor(range(1, len(rows))))
    state.join(later)  # type: ignore[arg-type]
    found.append(state.advance(torch.cat([tokens[1:, 2:3], tokens[:, :1]])))
    return torch.cat(found).float().log_softmax(dim=-1)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Call an RMSNorm, as one kernel where that rounds in the same way."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if x.dtype != torch.float32 or weight.dtype != x.dtype:
        return norm(x)
    return rms_norm(x, weight.shape, weight, norm.variance_epsilon)  # type: ignore[arg-type]
