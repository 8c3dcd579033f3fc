"""Drawing tokens: filters on logits, and inverse-CDF sampling from given uniforms.

Shapes: R rows, V tokens of the vocabulary. The uniforms come from streams named by seed, prompt and
sample, so a sample does not depend on the batch it is drawn in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgrpo.core.seeding import generator

BLOCK = 256
"""Tokens that are summed together when a large vocabulary is searched."""
BELOW_ONE = 1 - 2**-53
"""The largest float64 below 1; a number times it is always smaller."""
IN_ORDER = ("cpu",)
"""Devices whose running sums add one number after the other, so that they never fall."""


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Scale logits and set those of the excluded tokens to minus infinity.

    The filters apply in this order, each to what the one before left; the likeliest token always
    stays.

    Args:
        logits: ``[R, V]``; log-probabilities will do.
        temperature: divides the logits; 0 keeps only the likeliest token (the first of equals).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches ``top_p``
            (nucleus sampling, arXiv:1904.09751).
        min_p: drop tokens less probable than ``min_p`` times the likeliest (arXiv:2407.01082).

    Returns:
        ``[R, V]`` logits, not normalised again.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = _keep_top_k(logits, top_k)
    if top_p < 1:
        logits = _keep_nucleus(logits, top_p)
    if min_p > 0:
        log_p = logits.log_softmax(dim=-1)
        floor = log_p.amax(dim=-1, keepdim=True) + torch.tensor(min_p).log()
        logits = logits.masked_fill(log_p < floor, -torch.inf)
    return logits


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    values, ids = logits.topk(top_k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, ordered)


def sample_inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which the cumulative probability exceeds each uniform.

    A large vocabulary is summed in blocks first, and only the block that holds the token token by
    token. Running sums are float64.

    Args:
        probs: ``[R, V]`` non-negative weights, normalised or not.
        uniforms: ``[R]`` numbers in ``[0, 1]``.

    Returns:
        ``[R]`` int64 ids. Never one of weight zero, whatever the uniform: only tokens of positive
        weight are candidates, and the last of them exceeds every target.
    """
    size = probs.shape[-1]
    uniforms = uniforms.double().clamp(max=BELOW_ONE).unsqueeze(1)
    if size <= 2 * BLOCK:
        cdf = _running_sum(probs)
        return _first_above(cdf, uniforms * cdf.narrow(1, size - 1, 1)).squeeze(1)
    whole = size // BLOCK * BLOCK
    sums = probs[:, :whole].unflatten(-1, (-1, BLOCK)).sum(dim=-1)
    sums = torch.cat([sums, probs[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    cdf = _running_sum(sums)
    target = uniforms * cdf[:, -1:]
    block = _first_above(cdf, target)
    left = target - (cdf.gather(-1, block) - sums.gather(-1, block))
    place = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(-1, place.clamp(max=size - 1)).masked_fill(place >= size, 0)
    cdf = _running_sum(inside)
    found = _first_above(cdf, torch.minimum(left, cdf[:, -1:] * BELOW_ONE))
    return (block * BLOCK + found).squeeze(-1)


def _running_sum(weights: Tensor) -> Tensor:
    """Return the ``[R, n]`` float64 sums of ``[R, n]`` up to each place; they never fall."""
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    if cdf.device.type in IN_ORDER:  # a weight of zero leaves the sum as it is
        return cdf
    return cdf.masked_fill_(weights <= 0, -1.0).cummax(dim=-1).values


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """Return the ``[R, 1]`` first place where a running sum exceeds ``target [R, 1]``."""
    place = torch.searchsorted(cdf, target, right=True)
    return place.clamp_(max=cdf.shape[-1] - 1)  # where there is no number, none exceeds another


def draw_uniforms(seed: int, streams: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Return ``[R, count]`` float64 uniforms in ``[0, 1)``, on the CPU.

    Row r is the stream of (seed, prompt index, sample number), whichever other rows there are; its
    first numbers do not depend on ``count``.
    """
    return torch.stack(
        [
            torch.rand(count, dtype=torch.float64, generator=generator(seed, prompt, sample))
            for prompt, sample in streams
        ]
    )
