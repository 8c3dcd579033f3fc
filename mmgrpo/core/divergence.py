"""KL estimators on sampled decisions, and the drift regulariser. All ``[B, T]``.

With d = log_prob - other_log_prob on decisions sampled from the policy, k1 and k3 are unbiased for
KL(policy || other); as *losses*, k2's gradient is the reverse KL's on-policy, k3's is not, and
k1's has expectation zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.ratios import LOG_RATIO_LIMIT


def k1(log_prob: Tensor, other_log_prob: Tensor) -> Tensor:
    """Return d."""
    return log_prob - other_log_prob


def k2(log_prob: Tensor, other_log_prob: Tensor) -> Tensor:
    """d^2 / 2."""
    return k1(log_prob, other_log_prob) ** 2 / 2


def k3(log_prob: Tensor, other_log_prob: Tensor) -> Tensor:
    """exp(-d) + d - 1 >= 0."""
    difference = k1(log_prob, other_log_prob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-difference) + difference


def squared_gap(prediction: Tensor, other: Tensor) -> Tensor:
    """(v - v')^2 of predictions ``[B, T, ...]``, the mean over the elements."""
    return ((prediction - other) ** 2).flatten(2).mean(dim=2)


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """Forward value of one estimator with the gradient of another."""
    return value.detach() + gradient - gradient.detach()


def drift(log_prob: Tensor, log_ratio: Tensor, *, cap: float = 2.0) -> Tensor:
    """sg[min(ratio - 1, cap)] log_prob: k3's gradient of KL(old || policy), coefficient capped.

    The cap is on the gradient, not on the estimator (CPGD, arXiv:2505.12504).
    """
    return torch.expm1(log_ratio).clamp_max(cap).detach() * log_prob
