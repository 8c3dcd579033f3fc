"""The references of methods that compare pairs; see :mod:`method_references`."""

from math import exp, log1p

from method_references import reference, same


def softplus(x):
    return max(x, 0.0) + log1p(exp(-abs(x)))


def nested(b):
    """Best with worst, second with second worst, ... of each group, while they differ."""
    found = []
    for rows in b.groups:
        order = sorted(rows, key=lambda i: -b.reward[i])
        while len(order) > 1 and not same([b.reward[order[0]], b.reward[order[-1]]]):
            found.append((order.pop(0), order.pop(-1)))
    return found


def paired(b, pairs, loss_of):
    """Signs as advantages, and the mean over pairs of the mean over their common decisions."""
    a, loss = {}, 0.0
    for w, r in pairs:
        common = [t for t in b.steps[w] if t in b.steps[r]]
        a |= {(w, t): 1.0 for t in common} | {(r, t): -1.0 for t in common}
        loss += sum(loss_of(w, r, t) for t in common) / len(common) / len(pairs)
    return a, loss


@reference
def d3po(b, lp, sg):
    def loss_of(w, r, t):
        rho = [min(max(exp(lp[i][t] - b.ref[i][t]), 0.9), 1.1) for i in (w, r)]
        return softplus(-0.1 * (log1p(rho[0] - 1) - log1p(rho[1] - 1)))

    return paired(b, nested(b), loss_of)


def extremes(b):
    """Best and worst of each group."""
    found = []
    for rows in b.groups:
        w, r = max(rows, key=lambda i: b.reward[i]), min(rows, key=lambda i: b.reward[i])
        if not same([b.reward[w], b.reward[r]]):
            found.append((w, r))
    return found


@reference
def diffusion_dpo(b, lp, sg):
    def loss_of(w, r, t):
        errors = [-lp[i][t] for i in (w, r)]
        ref = [-b.ref[i][t] for i in (w, r)]
        return softplus(2000 / 2 * ((errors[0] - ref[0]) - (errors[1] - ref[1])))

    return paired(b, extremes(b), loss_of)


@reference
def seppo(b, lp, sg):
    def loss_of(w, r, t):
        d = [(-lp[i][t]) - (-b.ref[i][t]) for i in (w, r)]
        s = 1 if -b.ref[w][t] >= -sg[w][t] else -1
        return softplus(1000 * (d[0] - s * d[1]))

    return paired(b, extremes(b), loss_of)
