"""References of the methods for autoregressive image generators; see ``method_references``."""

from __future__ import annotations

from math import exp

from method_references import ppo, reference, same, spread, z_score


@reference
def simplear(b, lp, sg):
    a, loss = z_score(b, 1e-4), 0.0
    for i, steps in enumerate(b.steps):
        for t in steps:
            d = lp[i][t] - b.ref[i][t]
            term = ppo(exp(lp[i][t] - b.old[i][t]), a[i], 0.2, 0.2) + 0.04 * (exp(-d) + d - 1)
            loss += term / len(steps) / len(b.steps)
    return spread(b, a), loss


@reference
def reasongen_r1(b, lp, sg):
    """The controlled entropies come with their weights; the stand-in's entropy is p / 2."""
    scores, surrogate, entropy, count = z_score(b, 1e-6), 0.0, 0.0, 0
    kept = [i for rows in b.groups if not same([b.reward[i] for i in rows]) for i in rows]
    for i in kept:
        for t in b.steps[i]:
            surrogate += ppo(exp(lp[i][t] - b.old[i][t]), scores[i], 0.2, 0.2)
            entropy += b.entropy_weight[i][t] * exp(lp[i][t]) / 2
            count += 1
    return {(i, t): scores[i] for i in kept for t in b.steps[i]}, surrogate / count + entropy


@reference
def unirl(b, lp, sg):
    a, loss = z_score(b, 1e-6), 0.0
    for i, steps in enumerate(b.steps):
        terms = [ppo(exp(lp[i][t] - b.old[i][t]), a[i], 0.2, 0.2) for t in steps]
        loss += sum(terms) / len(steps) / len(b.steps)
    return spread(b, a), loss
