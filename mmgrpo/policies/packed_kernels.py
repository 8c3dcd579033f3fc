"""Attention within a packed row: each token sees its own sequence up to itself, and its prompt.

Three ways to compute the same: anywhere; on a CPU, without copies of prompts; on a GPU, in one
kernel.

Shapes: S tokens of a row, H heads of queries, K heads of keys, D features; P prompts of up to L
tokens, r completions of up to W tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from mmgrpo.policies.packing import Layout
from mmgrpo.policies.ragged import Ragged, join

Kernel = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]
"""From queries ``[S, H, D]``, keys and values ``[S, K, D]``, the layout and the scale of the scores
to ``[S, H, D]``."""


def kernels(device: torch.device) -> tuple[Kernel, ...]:
    """Return what can be tried on a device, best first."""
    return (*FAST.get(device.type, ()), padded_attention)


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """Attend in rectangles: the prompts, then each completion with a copy of its prompt's keys."""
    prompts, rows, parts = layout.prompts, layout.rows, (query, key, value)
    q, k, v = (prompts.pad(x[: prompts.total]) for x in parts)
    found = prompts.flat(_sdpa(q, k, v, None, scale))
    if not rows.total:
        return found
    own, *pairs = (rows.pad(x[prompts.total :]) for x in parts)
    k, v = (torch.cat([x[layout.owner], new], dim=1) for x, new in zip((k, v), pairs, strict=True))
    mask = layout.visible[:, None]
    return torch.cat([found, rows.flat(_sdpa(own, k, v, mask, scale))])


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[n, l, H, D]`` of queries ``[n, l, H, D]``; causal without a mask."""
    found = scaled_dot_product_attention(
        _heads(query),
        _heads(key),
        _heads(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return _heads(found)


def _heads(x: Tensor) -> Tensor:
    """Swap tokens and heads."""
    return x.transpose(1, 2)


# -- CPU: two softmaxes, merged by their log-sum-exp (arXiv:2402.05099) --------------------------


def merged_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """Attend to prompts with all their completions at once, and to completions by themselves."""
    return _Merged.apply(query, key, value, layout, scale)


class _Merged(torch.autograd.Function):
    """Each part's gradient is its own attention's, with the output and log-sum-exp of the whole.

    exp(score - lse) then is the probability among all keys.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *states, layout, scale = given
        first, *later = _parts(states, layout, scale)
        found, lse = first.forward()
        if later:
            (alone, lse_alone), (others, lse_others) = (part.forward() for part in later)
            weight = (lse_alone - lse_others).sigmoid().unsqueeze(-1)
            merged = torch.lerp(others.to(lse.dtype), alone.to(lse.dtype), weight)
            found = torch.cat([found, merged.to(found.dtype)])
            lse = torch.cat([lse, torch.logaddexp(lse_alone, lse_others)])
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(*states, found, lse)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *states, found, lse = ctx.saved_tensors
        first, *later = _parts(states, ctx.layout, ctx.scale)
        count = ctx.layout.prompts.total
        of_first, of_last = ([x[p] for x in (grad, found, lse)] for p in _cut(count))
        prompts = first.backward(*of_first)
        if not later:
            return (*prompts, None, None)
        own, shared = (part.backward(*of_last) for part in later)
        queries = torch.cat([prompts[0], own[0] + shared[0]])
        keys, values = (
            torch.cat([a + b, c]) for a, b, c in zip(prompts[1:], shared[1:], own[1:], strict=True)
        )
        return (queries, keys, values, None, None)


class _Part:
    """Attention of sequences of queries to as many sequences of keys, in rectangles.

    With ``causal`` they are the same sequences, and no query meets the padding behind its keys.
    """

    def __init__(
        self,
        states: Sequence[Tensor],
        sides: Sequence[tuple[Ragged, Ragged]],
        scale: float,
        *,
        causal: bool,
    ) -> None:
        self.sides = [(queries, keys, keys) for queries, keys in sides]
        self.counts = [len(x) for x in states]
        self.heads = [
            [_heads(side.pad(x)) for side, x in zip(each, states, strict=True)]
            for each in self.sides
        ]
        self.options: list[dict[str, Any]] = [
            {
                "dropout_p": 0.0,
                "is_causal": causal,
                "scale": scale,
                "attn_mask": None if causal or keys.even else _bias(keys.inside, states[0].dtype),
            }
            for _, keys in sides
        ]

    def forward(self) -> list[Tensor]:
        """What the queries find, ``[s, H, D]``, and their log-sum-exp ``[s, H]``."""
        # The public function computes the log-sum-exp too, but does not return it.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
        found = [
            kernel(*heads, **options)
            for heads, options in zip(self.heads, self.options, strict=True)
        ]
        return self._join(found, (0, 0))

    def backward(self, grad: Tensor, found: Tensor, lse: Tensor) -> list[Tensor]:
        """Gradients of the queries, keys and values."""
        # Behind the end of a sequence there is no gradient, and every probability is exp(-inf).
        ends = ((grad, 0.0), (found, 0.0), (lse, torch.inf))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
        gradients = []
        for (side, *_), heads, options in zip(self.sides, self.heads, self.options, strict=True):
            of_found, *results = (_heads(side.fill(x, end)) for x, end in ends)
            gradients.append(kernel(of_found, *heads, *results, **options))
        return self._join(gradients, (0, 1, 2))

    def _join(self, results: Sequence[Sequence[Tensor]], places: Sequence[int]) -> list[Tensor]:
        """Tokens of the rectangles' results, which lie as the states of the given places do."""
        return [
            join(
                [side[place] for side in self.sides], [_heads(x) for x in each], self.counts[place]
            )
            for place, each in zip(places, zip(*results, strict=True), strict=True)
        ]


def _bias(inside: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, 1, 1, l]``: 0 in the mask, minus infinity elsewhere."""
    bias = torch.zeros(inside.shape, dtype=dtype, device=inside.device)
    return bias.masked_fill_(~inside, -torch.inf)[:, None, None]


def _parts(tokens: Sequence[Tensor], layout: Layout, scale: float) -> list[_Part]:
    """Prompts among themselves; completions among themselves, and completions to their prompts."""
    first, last = ([x[part] for x in tokens] for part in _cut(layout.prompts.total))
    mixed = [last[0], *first[1:]]
    states = zip((first, last, mixed), (True, True, False), strict=True)
    return [
        _Part(each, sides, scale, causal=causal)
        for (each, causal), sides in zip(states, layout.parts, strict=False)
    ]


def _cut(count: int) -> tuple[slice, slice]:
    return slice(count), slice(count, None)


# -- GPU ------------------------------------------------------------------------------------------


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """Attend in one kernel that skips what no token sees (FlexAttention, arXiv:2412.05496)."""
    states = [x[None].transpose(1, 2) for x in (query, key, value)]
    run = _compiled_flex() if query.device.type == "cuda" else _flex()
    many = query.shape[1] != key.shape[1]
    return _heads(run(*states, block_mask=layout.blocks, scale=scale, enable_gqa=many))[0]


def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return flex


@cache
def _compiled_flex() -> Any:
    return torch.compile(_flex(), dynamic=True)


FAST: dict[str, tuple[Kernel, ...]] = {"cpu": (merged_attention,), "cuda": (flex_attention,)}
