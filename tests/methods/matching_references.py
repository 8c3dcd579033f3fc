"""Forward-process methods in plain float loops; see :mod:`method_references`."""

import statistics
from math import exp

from method_batches import DIRECTION
from method_references import (
    centre,
    clamped,
    flow_advantage,
    group_mean,
    ppo,
    reference,
    spread,
    z_score,
)


def errors(b, lp, sg, i, t, *, beta=1.0, level=1.0):
    """Squared error and frozen absolute error of v_old + beta (v - v_old)."""
    squares, sizes = [], []
    for k, along in enumerate(DIRECTION):
        for values, found in ((lp, squares), (sg, sizes)):
            v = b.velocity[i][t][k] + beta * (values[i][t] - b.old[i][t]) * along
            found.append(level * (v - b.target[i][t][k]))
    return statistics.fmean(x * x for x in squares), statistics.fmean(abs(x) for x in sizes)


def good(a):
    return min(max(a / 10 + 0.5, 0.0), 1.0)


def kl(b, lp, i, t):
    return (lp[i][t] - b.ref[i][t]) ** 2 / 8


@reference
def awm(b, lp, sg):
    a = {i: x / 5 for i, x in flow_advantage(b).items()}
    loss = 0.0
    for i, t in b.all:
        d = lp[i][t] - b.old[i][t]
        v = [start + d * along for start, along in zip(b.velocity[i][t], DIRECTION, strict=True)]
        gaps = [(x - y) ** 2 for x, y in zip(v, b.ref_velocity[i][t], strict=True)]
        loss += ppo(exp(d), a[i], 1.0, 1.0) + d**2 / 8 + 0.001 * statistics.fmean(gaps)
    return spread(b, a), loss / len(b.all)


@reference
def diffusion_nft(b, lp, sg):
    a, loss = flow_advantage(b), 0.0
    for i, t in b.all:
        r, level = good(a[i]), b.sigma[i][t]
        for share, beta in ((r, 1.0), (1 - r, -1.0)):
            square, size = errors(b, lp, sg, i, t, beta=beta, level=level)
            loss += 5 * share * square / max(size, 1e-5)
        loss += 1e-4 * kl(b, lp, i, t)
    return spread(b, a), loss / len(b.all)


@reference
def dgpo(b, lp, sg):
    a, loss = clamped(z_score(b, 1e-6)), 0.0
    for rows in b.groups:
        for t in {t for i in rows for t in b.steps[i]}:
            there = [i for i in rows if t in b.steps[i]]
            gained = statistics.fmean(a[i] * 100 * (b.ref[i][t] - sg[i][t]) for i in there)
            weight = 1 / (1 + exp(-gained))
            for i in there:
                rho = exp(sg[i][t] - b.old[i][t])
                cut = rho > 1 + 1e-4 if a[i] > 0 else rho < 1 - 1e-4
                cut = cut and a[i] != 0
                loss -= weight * a[i] * (sg if cut else lp)[i][t]
    return spread(b, a), loss / len(b.all)


@reference
def crd(b, lp, sg):
    scale = statistics.pstdev(b.reward) + 1e-6
    a = clamped({i: x / scale for i, x in centre(b, b.reward, group_mean).items()})
    loss = 0.0

    def size(values, i, t, beta):
        """Error of v_old + beta (v - v_old), over its frozen absolute error."""
        square, absolute = errors(b, values, sg, i, t, beta=beta)
        return square / max(absolute, 1e-5)

    for rows in b.groups:
        for t in {t for i in rows for t in b.steps[i]}:
            there = [i for i in rows if t in b.steps[i]]
            mean = statistics.fmean(size(sg, i, t, 0.0) - size(sg, i, t, 1.0) for i in there)
            middle = statistics.fmean(good(a[i]) for i in there)
            for i in there:
                rho = size(lp, i, t, 0.0) - size(lp, i, t, 1.0)
                loss += 5 * ((rho - mean) - (good(a[i]) - middle)) ** 2
                loss += (1e-4 + good(a[i]) * (0.1 - 1e-4)) * kl(b, lp, i, t)
    return spread(b, a), loss / len(b.all)
