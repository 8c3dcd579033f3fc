"""Log-probabilities behind a plain linear output head, forward and backward in tiles.

The gradient of a tile's logits is written down rather than recorded, so that a tile costs one
product forward and two backward. What fits ``KEPT_ELEMENTS`` is kept for them, and computed again
beyond.

Shapes: N decisions, n of them in a tile, D hidden features, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmgrpo.policies.products import is_plain, is_whole, product, transposed_product
from mmgrpo.policies.token_logits import (
    TILE_ELEMENTS,
    Head,
    TokenReading,
    entropy,
    log_distribution,
    read_hidden,
    unchanged,
)

KEPT_ELEMENTS = 2**24
"""Log-probabilities of tokens that are kept for the backward pass: 64 MiB."""
CACHED_ELEMENTS = 2**22
"""Logits of a tile that a CPU's cache holds."""
LEAST_ROWS = 128
"""Below this many rows, a tile adds to the gradient of the weight more than it computes of it."""


def tile_reader(
    head: Any, finish: Head, *, size: int, rows: int | None
) -> Callable[..., TokenReading]:
    """Return what reads hidden states in tiles, see :func:`read_hidden`.

    Args:
        head: the output head of a model, with one hook that chooses positions.
        finish: what the model does to the logits afterwards.
        size: tokens of the vocabulary.
        rows: positions in a tile; None: by the size of their logits.
    """
    most = max(1, TILE_ELEMENTS // size)
    if finish is not unchanged or not is_plain(head, hooks=1) or not is_whole(head.weight):
        return partial(read_hidden, head=lambda hidden: finish(head(hidden)), rows=rows or most)
    if head.weight.device.type == "cpu":
        most = min(most, max(LEAST_ROWS, CACHED_ELEMENTS // size))
    return partial(read_linear, weight=head.weight, bias=head.bias, rows=rows or most)


def read_linear(
    hidden: Tensor,
    ids: Tensor,
    temperature: Tensor,
    forbidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    with_entropy: bool,
) -> TokenReading:
    """Return what :func:`~mmgrpo.policies.token_logits.read_hidden` returns for a linear head.

    Args:
        hidden: ``[N, D]`` what the output head reads.
        ids: ``[N]`` int64, the tokens that were chosen.
        temperature: ``[N]`` float32.
        forbidden: ``[K]`` int64 token ids that can never be sampled.
        weight: ``[V, D]`` of the head.
        bias: ``[V]`` of the head.
        rows: positions in a tile, at least 1.
        with_entropy: also return the entropies.
    """
    return TokenReading(
        *_LinearReading.apply(hidden, weight, bias, ids, temperature, forbidden, rows, with_entropy)
    )


class _LinearReading(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
    ) -> tuple[Tensor, Tensor | None]:
        ids, temperature, forbidden, rows, with_entropy = others
        room = KEPT_ELEMENTS if any(ctx.needs_input_grad) else 0
        found, entropies, kept = [], [], []
        for h, i, t in _tiles(rows, hidden, ids, temperature):
            log_p = _log_p(h, t, weight, bias, forbidden)
            found.append(log_p.gather(-1, i).squeeze(-1))
            entropies += [entropy(log_p)] if with_entropy else []
            room -= log_p.numel()
            kept += [log_p] if room >= 0 else []
        whole = torch.cat(entropies) if with_entropy else None
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, ids, temperature, forbidden, whole, *kept)
        return torch.cat(found), whole

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, temperature, forbidden, whole, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        upstream = [temperature.new_zeros(len(ids)) if grad is None else grad / temperature]
        upstream += [] if entropy_grad is None else [entropy_grad / temperature, whole]
        states, of_weight, of_bias = [], None, None
        columns = _tiles(ctx.rows, hidden, ids, temperature, *upstream)
        for number, (h, i, t, *up) in enumerate(columns):
            again = number >= len(kept)
            log_p = _log_p(h, t, weight, bias, forbidden) if again else kept[number]
            change = logit_gradient(log_p, i, *up).index_fill_(-1, forbidden, 0.0).to(h.dtype)
            states += [product(change, weight.t())] if needs[0] else []
            of_weight = _add(of_weight, transposed_product(change, h)) if needs[1] else None
            of_bias = _add(of_bias, change.sum(dim=0)) if needs[2] else None
        return (torch.cat(states) if states else None, of_weight, of_bias, *(None,) * 5)


def logit_gradient(
    log_p: Tensor,
    ids: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None = None,
    entropies: Tensor | None = None,
) -> Tensor:
    """Return the ``[n, V]`` gradient that logits get from log-probabilities and entropies.

    d log p_i / d z_v = [v = i] - p_v, and d H / d z_v = -p_v (log p_v + H).

    Args:
        log_p: ``[n, V]``.
        ids: ``[n, 1]`` the tokens i.
        grad: ``[n, 1]`` gradient of their log-probabilities.
        entropy_grad: ``[n, 1]`` gradient of the entropies.
        entropies: ``[n, 1]`` the entropies H.
    """
    change = log_p.exp()
    if entropy_grad is None or entropies is None:
        change.mul_(-grad)
    else:  # where the bound holds, the probability is 0 in float32
        change.mul_((log_p.clamp(min=-1000.0) + entropies).mul_(-entropy_grad).sub_(grad))
    return change.scatter_add_(-1, ids, grad)


def _log_p(h: Tensor, t: Tensor, weight: Tensor, bias: Tensor | None, forbidden: Tensor) -> Tensor:
    whole = t.device.type == "cpu" and bool((t == 1).all())  # a GPU would have to be waited for
    return log_distribution(product(h, weight, bias), 1.0 if whole else t, forbidden)


def _tiles(rows: int, hidden: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split ``[N, D]`` states, and ``[N]`` columns as ``[n, 1]``."""
    split = [hidden.split(rows), *(column[:, None].split(rows) for column in columns)]
    return zip(*split, strict=True)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
