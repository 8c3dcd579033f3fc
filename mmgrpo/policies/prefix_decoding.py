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
from torch.linalg import vector_norm
from torch.nn.functional import linear, rms_norm, silu

from mmgrpo.policies.decoding import TokenState
from mmgrpo.policies.fast_layers import inverse_length
from mmgrpo.policies.prefix_cache import PrefixCache
from mmgrpo.policies.products import is_float_on_cpu, is_plain, multiply, packed

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
        x = self._decoder.embed_tokens(tokens).squeeze(1)
        if not self._rotations:
            self._rotations = self._rotate_ahead(x)
        rotation = self._rotations.pop()
        self._cache.open()
        for number, layer in enumerate(self._layers):
            queries, pair = layer.project(x, *rotation)
            x = layer.output(x, self._cache.attend(number, queries, pair))
            x = layer.feed(x)
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
    """What a layer does, without the lookups that calling its modules takes.

    Attributes:
        states: turns ``[r, X]`` into queries, keys and values ``[r, H + 2K, D]``, not yet rotated.
        output: adds to ``[r, X]`` what is made of ``[r, H * D]``.
        feed: what follows the attention.
        heads: H and K.
    """

    states: Apply
    output: Callable[[Tensor, Tensor], Tensor]
    feed: Apply
    heads: tuple[int, int]

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attn, feed = layer.self_attn, _feed(layer.post_attention_layernorm, layer.mlp)
        return cls(
            states=_states(layer.input_layernorm, attn),
            output=_added(attn.o_proj),
            feed=lambda x: x + feed(x),
            heads=_heads(layer),
        )

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries ``[r, H, D]`` and keys, both rotated, with the values ``[r, 2, K, D]``."""
        queries, keys = self.heads
        states = self.states(x)
        size = states.shape[-1]
        states = torch.addcmul(states * cos, states.roll(size // 2, dims=-1), sin)
        rotated, pair = states.split((queries, 2 * keys), dim=1)
        return rotated, pair.view(len(x), 2, keys, size)


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
    if weight.numel() < PACKED or not is_float_on_cpu(weight):
        return partial(linear, weight=weight, bias=bias)
    if not torch.backends.mkldnn.is_available():
        return partial(linear, weight=weight, bias=bias)
    return partial(multiply, weight=packed(weight), bias=bias)


def _added(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what adds a layer's output to something."""
    apply = _linear(module)
    if isinstance(apply, partial) and apply.func is linear and apply.keywords["bias"] is None:
        weight = apply.keywords["weight"].t()
        return lambda x, h: torch.addmm(x, h, weight)
    return lambda x, h: x + apply(h)


def _states(norm: nn.Module, attn: Any) -> Apply:
    """Return a norm with the projections behind it: ``[r, H + 2K, D]`` of ``[r, X]``."""
    size, normed = attn.head_dim, hasattr(attn, "q_norm")
    modules = (attn.q_proj, attn.k_proj, attn.v_proj)
    together = None if normed else _joined(norm, modules)
    if together is not None:
        return lambda x: together(x).view(len(x), -1, size)
    first, (queries, keys, values) = _norm(norm), (_linear(module) for module in modules)
    norms = (_norm(attn.q_norm), _norm(attn.k_norm)) if normed else None

    def apply(x: Tensor) -> Tensor:
        h = first(x)
        q, k, v = (p(h).view(len(h), -1, size) for p in (queries, keys, values))
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        return torch.cat([q, k, v], dim=1)

    return apply


def _feed(norm: nn.Module, mlp: Any) -> Apply:
    """Return a norm with the gated network behind it."""
    activate = silu if type(mlp.act_fn).__name__ == "SiLUActivation" else mlp.act_fn
    gates, down = _gates(norm, mlp), _linear(mlp.down_proj)

    def apply(x: Tensor) -> Tensor:
        gated, states = gates(x)
        return down(activate(gated).mul_(states))

    return apply


def _gates(norm: nn.Module, mlp: Any) -> Callable[[Tensor], Sequence[Tensor]]:
    """Return a norm with both products of a gated network, which are one where they are small."""
    together = _joined(norm, (mlp.gate_proj, mlp.up_proj))
    if together is not None:
        return lambda x: together(x).chunk(2, dim=-1)
    first, gate, up = _norm(norm), _linear(mlp.gate_proj), _linear(mlp.up_proj)

    def apart(x: Tensor) -> Sequence[Tensor]:
        h = first(x)
        return gate(h), up(h)

    return apart


def _joined(norm: nn.Module, modules: Sequence[nn.Module]) -> Apply | None:
    """Return a norm and small layers behind it as one, with copies of weights; None for others."""
    if not all(is_plain(module) for module in modules):
        return None
    weights: list[Any] = [module.weight for module in modules]
    biases: list[Any] = [module.bias for module in modules]
    if sum(weight.numel() for weight in weights) > JOINED or len({b is None for b in biases}) > 1:
        return None
    weight, bias = torch.cat(weights), None if biases[0] is None else torch.cat(biases)
    scale: Any = norm.weight
    if not is_float_on_cpu(scale):
        first, product = _norm(norm), _product(weight, bias)
        return lambda x: product(first(x))
    # x / sqrt(mean(x^2) + eps), both divided by the root of the number of features
    size: int = weight.shape[1]
    eps: Any = norm.variance_epsilon
    least = weight.new_tensor(eps * size).sqrt()
    product = _product(weight * (scale * size**0.5), bias)
    return lambda x: product(x / vector_norm(x, dim=-1, keepdim=True).hypot_(least))


def _norm(norm: nn.Module) -> Apply:
    """Return an RMSNorm, in few steps where they round in the same way."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if weight.dtype != torch.float32:
        return norm
    eps: float = norm.variance_epsilon  # type: ignore[assignment]
    if not is_float_on_cpu(weight):  # where it is one kernel
        return partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
    least = weight.new_tensor(eps)
    return lambda x: (x * inverse_length(x, least)).mul_(weight)
