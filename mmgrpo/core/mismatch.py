"""How far the engine that sampled is from the policy that trains, in numbers.

With l = old_log_prob - rollout_log_prob of a sampled decision, exp(l) is the importance ratio of
the policy to the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgrpo.core.divergence import k3
from mmgrpo.core.trajectories import Trajectories

QUANTILES = {"mismatch/ratio_p50": 0.5, "mismatch/ratio_p99": 0.99, "mismatch/ratio_max": 1.0}


def sampled_log_probs(trajectories: Trajectories) -> Tensor | None:
    """``[N, 2]`` (engine's, policy's) log-probabilities of all masked-in decisions, row by row.

    None where the policy itself sampled, or did not evaluate the samples.
    """
    engine, policy = trajectories.rollout_log_prob, trajectories.old_log_prob
    if engine is None or policy is None:
        return None
    return torch.stack([engine, policy], dim=-1)[trajectories.mask].float()


def mismatch_metrics(log_probs: Tensor) -> dict[str, float]:
    """KL from the engine to the policy and quantiles of the ratio between them.

    The KL is the k3 estimate, mean of exp(l) - 1 - l over what the engine sampled; a quantile is
    the smallest ratio that at least this share of the decisions does not exceed.

    Args:
        log_probs: ``[N, 2]``, see :func:`sampled_log_probs`.

    Returns:
        ``mismatch/kl`` and ``mismatch/ratio_{p50,p99,max}``; nothing where N is 0.
    """
    if len(log_probs) == 0:
        return {}
    engine, policy = log_probs.double().unbind(-1)
    ordered = (policy - engine).sort().values
    places = {
        name: max(0, -(-int(q * 100) * len(ordered) // 100) - 1) for name, q in QUANTILES.items()
    }
    found = {name: float(ordered[place].exp()) for name, place in places.items()}
    return {"mismatch/kl": float(k3(engine, policy).mean()), **found}


def worst_decisions(trajectories: Trajectories, count: int) -> list[list[int]]:
    """Each row's decisions with the largest absolute l, worst first, at most ``count`` of them."""
    engine, policy = trajectories.rollout_log_prob, trajectories.old_log_prob
    if engine is None or policy is None:
        return [[] for _ in range(len(trajectories))]
    size = (policy - engine).abs().masked_fill(~trajectories.mask, -1.0)
    order = size.argsort(dim=1, descending=True, stable=True)[:, :count].tolist()
    return [row[: int(n)] for row, n in zip(order, trajectories.lengths.tolist(), strict=True)]
