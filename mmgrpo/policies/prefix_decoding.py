"""Decoding with shared prompts, for the models whose layers are those of Llama and Qwen.

The layers' own modules (projections, adapters in them, norms) are called; the attention between
them is that of :mod:`mmgrpo.policies.prefix_cache`, and what transformers does around them in every
step (masks, cache objects, positions) is done once or not at all.

Shapes: r rows, H heads of queries, K heads of keys, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from mmgrpo.policies.decoding import TokenState
from mmgrpo.policies.fast_layers import inverse_length
from mmgrpo.policies.prefix_cache import PrefixCache
from mmgrpo.policies.products import is_plain, multiply, packed

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
JOINED = 2**21
"""Weights up to which the projections of queries, keys and values are computed as one."""
PACKED = 2**16
"""Weights from which a CPU's product with few rows is worth a copy in another order."""

Apply = Callable[[Tensor], Tensor]


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
        self._decoder, self._head, self._count = (
            model.get_decoder(),
            model.get_output_embeddings(),
            count,
        )
        layers = [(layer.keys, layer.values) for layer in state.cache.layers]
        self._cache = PrefixCache(layers, state.mask)
        self._axes = state.axes
        self._next = state.next
        self.logits = state.logits
        self._layers: list[_Layer] = []
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

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Read ``[r, 1]`` tokens; return the ``[r, V]`` logits of what follows."""
        self._count()
        if not self._layers:
            self._layers = [_Layer.of(layer) for layer in self._decoder.layers]
            self._logits = _linear(self._head, hooks=1)  # one hook chooses positions: all of them
            self._norm = _norm(self._decoder.norm)
        x = self._decoder.embed_tokens(tokens)[:, 0]
        if not self._rotations:
            self._rotations = self._rotate_ahead(x)
        rotation = self._rotations.pop()
        self._cache.open()
        for number, layer in enumerate(self._layers):
            queries, pair = layer.project(layer.before(x), *rotation)
            x = x + layer.output(self._cache.attend(number, queries, pair))
            x = x + layer.feed(layer.between(x))
        self._next = self._next + 1
        self.logits = self._logits(self._norm(x))
        return self.logits

    def _rotate_ahead(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``[r, H + 2K, D]`` factors of the next tokens' rotations, last first, with the scale.

        Values are not rotated: their factors are one and zero.
        """
        attn = self._decoder.layers[0].self_attn
        steps = self._next[:, None] + torch.arange(AHEAD, device=x.device)
        cos, sin = self._decoder.rotary_emb(x[:, None], steps.expand(*self._axes, *steps.shape))
        if cos.dim() == 4:  # one for each axis, which are equal behind a prompt
            cos, sin = cos[0], sin[0]
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        queries, keys = self._layers[0].heads
        scale = cos.new_ones(queries + 2 * keys, 1)
        scale[:queries] = attn.scaling
        ahead = [part[:, :, None] * scale for part in (cos, sin)]
        for part, unmoved in zip(ahead, (1.0, 0.0), strict=True):
            part[:, :, queries + keys :] = unmoved
        ahead = [part.unbind(1) for part in ahead]
        return list(zip(*ahead, strict=True))[::-1]


@dataclass(frozen=True)
class _Layer:
    """What a layer does, without the lookups that calling its modules takes."""

    before: Apply
    queries: Apply
    keys: Apply
    values: Apply
    query_norm: Apply | None
    key_norm: Apply | None
    together: Apply | None
    output: Apply
    between: Apply
    feed: Apply
    size: int
    heads: tuple[int, int]

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attn = layer.self_attn
        normed = hasattr(attn, "q_norm")
        return cls(
            before=_norm(layer.input_layernorm),
            queries=_linear(attn.q_proj),
            keys=_linear(attn.k_proj),
            values=_linear(attn.v_proj),
            query_norm=_norm(attn.q_norm) if normed else None,
            key_norm=_norm(attn.k_norm) if normed else None,
            together=None if normed else _joined((attn.q_proj, attn.k_proj, attn.v_proj)),
            output=_linear(attn.o_proj),
            between=_norm(layer.post_attention_layernorm),
            feed=_feed(layer.mlp),
            size=attn.head_dim,
            heads=_heads(layer),
        )

    def project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated queries ``[r, H, D]``, and rotated keys with the values ``[r, 2K, D]``."""
        queries, keys = self.heads
        if self.together is not None:
            states = self.together(h).view(len(h), -1, self.size)
        else:
            q, k, v = (
                p(h).view(len(h), -1, self.size) for p in (self.queries, self.keys, self.values)
            )
            if self.query_norm is not None and self.key_norm is not None:
                q, k = self.query_norm(q), self.key_norm(k)
            states = torch.cat([q, k, v], dim=1)
        states = torch.addcmul(states * cos, states.roll(self.size // 2, dims=-1), sin)
        return states.narrow(1, 0, queries), states.narrow(1, queries, 2 * keys)


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


def _heads(layer: Any) -> tuple[int, int]:
    """Heads of queries and of keys."""
    attn = layer.self_attn
    keys = attn.k_proj.out_features // attn.head_dim
    return keys * attn.num_key_value_groups, keys


def _linear(module: nn.Module, hooks: int = 0) -> Apply:
    """Return what a layer computes; an adapter or a quantised layer is called as it is."""
    return _product(module.weight, module.bias) if is_plain(module, hooks) else module  # type: ignore[arg-type]


def _product(weight: Tensor, bias: Tensor | None) -> Apply:
    """Return the product with a weight, of which a CPU keeps a copy in oneDNN's order if large."""
    if weight.numel() < PACKED or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return partial(linear, weight=weight, bias=bias)
    if not torch.backends.mkldnn.is_available():
        return partial(linear, weight=weight, bias=bias)
    return partial(multiply, weight=packed(weight), bias=bias)


def _joined(modules: Sequence[nn.Module]) -> Apply | None:
    """Return several small layers as one, with a copy of their weights; None for others."""
    if not all(is_plain(module) for module in modules):
        return None
    weights: list[Any] = [module.weight for module in modules]
    biases: list[Any] = [module.bias for module in modules]
    if sum(weight.numel() for weight in weights) > JOINED:
        return None
    weight = torch.cat(weights)
    if any(bias is None for bias in biases):
        return None if any(bias is not None for bias in biases) else _product(weight, None)
    return _product(weight, torch.cat(biases))


def _feed(mlp: Any) -> Apply:
    """Return what a gated network does, with its first two products as one where they are small."""
    activate = silu if type(mlp.act_fn).__name__ == "SiLUActivation" else mlp.act_fn
    together, down = _joined((mlp.gate_proj, mlp.up_proj)), _linear(mlp.down_proj)
    if together is None:
        gate, up = _linear(mlp.gate_proj), _linear(mlp.up_proj)
        return lambda h: down(activate(gate(h)) * up(h))

    def apply(h: Tensor) -> Tensor:
        gated, states = together(h).chunk(2, dim=-1)
        return down(activate(gated) * states)

    return apply


def _norm(norm: nn.Module) -> Apply:
    """Return an RMSNorm, in few steps where they round in the same way."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if weight.dtype != torch.float32:
        return norm
    eps: float = norm.variance_epsilon  # type: ignore[assignment]
    if weight.device.type != "cpu":  # where it is one kernel
        return partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
    least = weight.new_tensor(eps)
    return lambda x: (x * inverse_length(x, least)).mul_(weight)
