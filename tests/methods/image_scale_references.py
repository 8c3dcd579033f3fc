"""References of the methods for next-scale image generators; see ``method_references``."""

from __future__ import annotations

from math import exp

from method_references import ppo, reference, spread, z_score


@reference
def var_grpo(b, lp, sg):
    a, loss = z_score(b, 1e-6), 0.0
    for i, t in b.all:
        d = lp[i][t] - b.ref[i][t]
        loss += ppo(exp(lp[i][t] - b.old[i][t]), a[i], 0.2, 0.2) + 0.01 * (exp(-d) + d - 1)
    return spread(b, a), loss / len(b.all)
