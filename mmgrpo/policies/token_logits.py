"""From a language model's logits to log-probabilities: the one place, for rollout and training.

Shapes: N decisions, D hidden features, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26
"""Above this many logits, the float32 softmax is computed in pieces and again in the backward."""

TILE_ELEMENTS = 2**24
"""Logits in a tile of the output head, unless the number of its rows is given."""

Head = Callable[[Tensor], Tensor]


class TokenReading(NamedTuple):
    """``[N]`` float32 log-probabilities and, when asked for, entropies, in nats."""

    log_prob: Tensor
    entropy: Tensor | None


def allowed_logits(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Set the logits of tokens that can never be sampled to minus infinity.

    Args:
        logits: ``[..., V]``.
        forbidden: ``[K]`` int64 token ids, image placeholders for example; may be empty.
    """
    if len(forbidden) == 0:
        return logits
    return logits.index_fill(-1, forbidden, -torch.inf)


def log_distribution(logits: Tensor, temperature: Tensor | float, forbidden: Tensor) -> Tensor:
    """Return the ``[..., V]`` float32 log-softmax of the allowed logits over the temperature.

    Args:
        logits: ``[..., V]`` in any float dtype.
        temperature: positive; broadcasts against ``[..., 1]``.
        forbidden: see :func:`allowed_logits`.
    """
    scaled = logits.float()
    if not (isinstance(temperature, float) and temperature == 1.0):
        scaled = scaled / temperature
    return allowed_logits(scaled, forbidden).log_softmax(dim=-1)


def entropy(log_p: Tensor, probs: Tensor | None = None) -> Tensor:
    """Return the ``[...]`` entropy in nats of ``[..., V]`` log-probabilities, 0 log 0 being 0.

    Args:
        log_p: ``[..., V]`` float32.
        probs: their exponentials, if they are there already.
    """
    # Where the bound holds, the probability is 0 in float32; so are the product and its gradient.
    probs = log_p.exp() if probs is None else probs
    return -torch.linalg.vecdot(probs, log_p.clamp(min=-1000.0))


def read_tokens(
    logits: Tensor, ids: Tensor, temperature: Tensor, forbidden: Tensor, *, with_entropy: bool
) -> TokenReading:
    """Return the log-probability of each chosen token.

    Args:
        logits: ``[N, V]`` in any float dtype.
        ids: ``[N]`` int64, the tokens that were chosen.
        temperature: ``[N]`` float32.
        forbidden: see :func:`allowed_logits`.
        with_entropy: also return the entropies.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return _read_tiles(_read, logits, ids, temperature, forbidden, with_entropy, rows)


def read_hidden(
    hidden: Tensor,
    ids: Tensor,
    temperature: Tensor,
    forbidden: Tensor,
    *,
    head: Head,
    rows: int,
    with_entropy: bool,
) -> TokenReading:
    """Return what :func:`read_tokens` returns, without ever holding all the logits.

    The head is applied to ``rows`` positions at a time, and again in the backward pass, so the
    memory it takes does not grow with N.

    Args:
        hidden: ``[N, D]`` what the output head reads.
        ids: see :func:`read_tokens`.
        temperature: see :func:`read_tokens`.
        forbidden: see :func:`allowed_logits`.
        head: turns ``[n, D]`` into ``[n, V]`` logits.
        rows: positions in a tile, at least 1.
        with_entropy: also return the entropies.
    """

    def read(hidden: Tensor, *rest: Any) -> TokenReading:
        return _read(head(hidden), *rest)

    return _read_tiles(read, hidden, ids, temperature, forbidden, with_entropy, rows)


def finish_logits(config: Any) -> Head:
    """Return what a model does to the output of its head: a scale, then a soft cap.

    Args:
        config: the configuration of a text model of transformers.
    """
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    factor = (getattr(config, "logit_scale", None) or 1.0) / divisor  # Cohere
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    if factor == 1.0 and not cap:
        return unchanged

    def finish(logits: Tensor) -> Tensor:
        logits = logits if factor == 1.0 else logits * factor
        return (logits / cap).tanh() * cap if cap else logits

    return finish


def unchanged(logits: Tensor) -> Tensor:
    """Return the logits themselves."""
    return logits


def _read_tiles(
    read: Callable[..., TokenReading],
    states: Tensor,
    ids: Tensor,
    temperature: Tensor,
    forbidden: Tensor,
    with_entropy: bool,
    rows: int,
) -> TokenReading:
    """Read ``rows`` decisions at a time; with more than one tile, again in the backward."""
    if len(ids) <= rows:
        return read(states, ids, temperature, forbidden, with_entropy)
    tiles = zip(states.split(rows), ids.split(rows), temperature.split(rows), strict=True)
    parts = [
        checkpoint(
            read, *tile, forbidden, with_entropy, use_reentrant=False, preserve_rng_state=False
        )
        for tile in tiles
    ]
    log_prob = torch.cat([part.log_prob for part in parts])
    return TokenReading(log_prob, torch.cat([p.entropy for p in parts]) if with_entropy else None)


def _read(
    logits: Tensor, ids: Tensor, temperature: Tensor, forbidden: Tensor, with_entropy: bool
) -> TokenReading:
    log_p = log_distribution(logits, temperature[:, None], forbidden)
    log_prob = log_p.gather(-1, ids[:, None]).squeeze(-1)
    return TokenReading(log_prob, entropy(log_p) if with_entropy else None)
