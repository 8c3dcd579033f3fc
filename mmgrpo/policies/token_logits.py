"""From a language model's logits to log-probabilities: the one place, for rollout and training.

Shapes: N decisions, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26
"""Above this many logits, the float32 softmax is computed in pieces and again in the backward."""


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
    return allowed_logits(logits.float() / temperature, forbidden).log_softmax(dim=-1)


def entropy(log_p: Tensor) -> Tensor:
    """Return the ``[...]`` entropy in nats of ``[..., V]`` log-probabilities, 0 log 0 being 0."""
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return -(log_p.exp() * finite).sum(dim=-1)


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
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    if len(ids) <= size:
        return _read(logits, ids, temperature, forbidden, with_entropy)
    pieces = zip(logits.split(size), ids.split(size), temperature.split(size), strict=True)
    parts = [
        checkpoint(
            _read, *piece, forbidden, with_entropy, use_reentrant=False, preserve_rng_state=False
        )
        for piece in pieces
    ]
    log_prob = torch.cat([part.log_prob for part in parts])
    return TokenReading(log_prob, torch.cat([p.entropy for p in parts]) if with_entropy else None)


def _read(
    logits: Tensor, ids: Tensor, temperature: Tensor, forbidden: Tensor, with_entropy: bool
) -> TokenReading:
    log_p = log_distribution(logits, temperature[:, None], forbidden)
    log_prob = log_p.gather(-1, ids[:, None]).squeeze(-1)
    return TokenReading(log_prob, entropy(log_p) if with_entropy else None)
