"""References of the methods for masked diffusion models; see :mod:`method_references`."""

from math import exp

from method_references import reference, spread, z_score
from preference_references import extremes, softplus


@reference
def vrpo_llada(b, lp, sg):
    """Every decision of a paired row; views are averaged, the better row is also supervised.

    Per token: the row has as many as ``tokens`` says.
    """

    def mean(values, i):
        return sum(values[i][t] for t in b.steps[i]) / len(b.steps[i])

    a, loss = {}, 0.0
    pairs = extremes(b)
    for w, r in pairs:
        a |= {(w, t): 1.0 for t in b.steps[w]} | {(r, t): -1.0 for t in b.steps[r]}
        score = [mean(lp, i) - mean(b.ref, i) for i in (w, r)]
        loss += (softplus(-0.2 * (score[0] - score[1])) - 0.05 * mean(lp, w) / b.tokens[w]) / len(
            pairs
        )
    return a, loss


@reference
def sepo(b, lp, sg):
    a, loss = z_score(b, 1e-8), 0.0
    for i, t in b.all:
        rho = exp(sg[i][t] - b.old[i][t])
        loss -= min(rho * a[i], min(max(rho, 0.8), 1.2) * a[i]) * lp[i][t]
    return spread(b, a), loss / len(b.steps)
