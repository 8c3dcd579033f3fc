"""Every preset once more, in plain float loops: what the papers say, without tensors.

A reference takes a batch as lists, the log-probabilities ``lp`` and a frozen copy ``sg`` of them
that stands wherever the method stops the gradient, and returns (advantages, loss). Differences of
the loss in ``lp`` with ``sg`` fixed are then the method's gradient.
"""

import statistics
from dataclasses import dataclass, replace
from math import exp, isnan, log

REFERENCES = {}


@dataclass
class Plain:
    """A batch as lists: one entry per sample; ``steps[i]`` are its trained decisions."""

    groups: list
    reward: list
    steps: list
    old: list
    ref: list
    greedy: list
    truncated: list
    std: list
    length: list
    history: list
    velocity: list
    target: list
    sigma: list
    entropy_weight: list
    tokens: list
    ref_velocity: list

    @classmethod
    def of(cls, trajectories):
        t = trajectories
        ids = t.group.tolist()
        return cls(
            groups=[[i for i, g in enumerate(ids) if g == name] for name in dict.fromkeys(ids)],
            reward=sum(t.rewards.values()).tolist(),
            steps=[[k for k, on in enumerate(row) if on] for row in t.mask.tolist()],
            old=t.old_log_prob.tolist(),
            ref=t.ref_log_prob.tolist(),
            greedy=t.baseline_reward.tolist(),
            truncated=t.truncated.tolist(),
            std=t.step_std.tolist(),
            length=t.step_length.tolist(),
            history=list(zip(t.history_mean.tolist(), t.history_std.tolist(), strict=True)),
            velocity=t.old_prediction.tolist(),
            target=t.target.tolist(),
            sigma=t.sigma.tolist(),
            entropy_weight=t.entropy_weight.tolist(),
            tokens=t.tokens.tolist(),
            ref_velocity=t.ref_prediction.tolist(),
        )

    @property
    def all(self):
        return [(i, t) for i, steps in enumerate(self.steps) for t in steps]


def reference(function):
    REFERENCES[function.__name__.replace("_", "-")] = function
    return function


def same(values):
    return max(values) - min(values) <= 1e-5 * max(abs(v) for v in values)


def ppo(rho, a, low, high):
    """Minus the clipped surrogate."""
    return -min(rho * a, min(max(rho, 1 - low), 1 + high) * a)


def centre(b, reward, baseline):
    """reward minus baseline(group's rewards, position); 0 for equal, reward for lonely samples."""
    a = {}
    for rows in b.groups:
        values = [reward[i] for i in rows]
        for k, i in enumerate(rows):
            a[i] = values[k] - baseline(rows, values, k)
            if len(rows) == 1:
                a[i] = values[0]
            elif same(values):
                a[i] = 0.0
    return a


def group_mean(rows, values, k):
    return statistics.fmean(values)


def others(rows, values, k):
    return statistics.fmean(values[:k] + values[k + 1 :]) if len(values) > 1 else 0.0


def z_score(b, eps, std=statistics.stdev):
    a = centre(b, b.reward, group_mean)
    for rows in b.groups:
        scale = std([b.reward[i] for i in rows]) if len(rows) > 1 else 1.0
        for i in rows:
            a[i] /= scale + eps
    return a


def clamped(a):
    return {key: max(-5.0, min(5.0, value)) for key, value in a.items()}


def flow_advantage(b):
    """Group mean, population std of the batch, clamped."""
    scale = statistics.pstdev(b.reward) + 1e-4
    a = centre(b, b.reward, group_mean)
    return clamped({i: a[i] / scale for i in a})


def spread(b, a):
    """The same advantage at every decision."""
    return {(i, t): a[i] for i, t in b.all}


@reference
def grpo(b, lp, sg):
    a, loss = z_score(b, 1e-6), 0.0
    for i, steps in enumerate(b.steps):
        for t in steps:
            d = lp[i][t] - b.ref[i][t]
            kl = exp(-d) + d - 1
            term = ppo(exp(lp[i][t] - b.old[i][t]), a[i], 0.2, 0.2) + 0.04 * kl
            loss += term / len(steps) / len(b.steps)
    return spread(b, a), loss


@reference
def dr_grpo(b, lp, sg, width=6):
    a = centre(b, b.reward, group_mean)
    terms = [ppo(exp(lp[i][t] - b.old[i][t]), a[i], 0.2, 0.2) for i, t in b.all]
    return spread(b, a), sum(terms) / (len(b.steps) * width)


@reference
def rloo(b, lp, sg):
    penalised = [
        r - 0.05 * sum(b.old[i][t] - b.ref[i][t] for t in b.steps[i])
        for i, r in enumerate(b.reward)
    ]
    a, loss = centre(b, penalised, others), 0.0
    for i, steps in enumerate(b.steps):
        rho = exp(sum(lp[i][t] - b.old[i][t] for t in steps))
        loss += ppo(rho, a[i], 0.2, 0.2) / len(b.steps)
    return spread(b, a), loss


def whitened(values):
    """Population z-score over all decisions of the batch."""
    mean, std = statistics.fmean(values.values()), statistics.pstdev(values.values())
    return {key: (value - mean) / max(std, 1e-4) for key, value in values.items()}


@reference
def reinforce_pp(b, lp, sg):
    returns = {}
    for i, steps in enumerate(b.steps):
        running = b.reward[i]
        for t in reversed(steps):
            running -= 0.001 * (b.old[i][t] - b.ref[i][t])
            returns[i, t] = running
    a = whitened(returns)
    terms = [ppo(exp(lp[i][t] - b.old[i][t]), a[i, t], 0.2, 0.2) for i, t in b.all]
    return a, sum(terms) / len(terms)


@reference
def reinforce_pp_baseline(b, lp, sg):
    a = whitened(spread(b, centre(b, b.reward, group_mean)))
    loss = 0.0
    for i, t in b.all:
        kl = (lp[i][t] - b.ref[i][t]) ** 2 / 2
        loss += ppo(exp(lp[i][t] - b.old[i][t]), a[i, t], 0.2, 0.2) + 0.001 * kl
    return a, loss / len(b.all)


@reference
def opo(b, lp, sg):
    def weighted(rows, values, k):
        lengths = [len(b.steps[i]) for i in rows]
        return sum(n * r for n, r in zip(lengths, values, strict=True)) / sum(lengths)

    a = centre(b, b.reward, weighted)
    return spread(b, a), -sum(a[i] * lp[i][t] for i, t in b.all) / len(b.all)


@reference
def gpg(b, lp, sg):
    valid = sum(not same([b.reward[i] for i in rows]) for rows in b.groups)
    alpha = min(10.0, len(b.groups) / max(valid, 1))
    a = {i: alpha * x for i, x in centre(b, b.reward, group_mean).items()}
    return spread(b, a), -sum(a[i] * lp[i][t] for i, t in b.all) / len(b.all)


@reference
def remax(b, lp, sg):
    a = {i: r - b.greedy[i] for i, r in enumerate(b.reward)}
    return spread(b, a), -sum(a[i] * lp[i][t] for i, t in b.all) / len(b.all)


@reference
def cpgd(b, lp, sg):
    a, loss = z_score(b, 1e-6), 0.0
    for i, t in b.all:
        now, old = lp[i][t], b.old[i][t]
        bounded = min(now, old + log(1.2)) if a[i] > 0 else max(now, old + log(0.8))
        loss += -a[i] * bounded + 0.001 * min(exp(sg[i][t] - old) - 1, 2.0) * now
    return spread(b, a), loss / len(b.all)


@reference
def dapo(b, lp, sg):
    mixed = [rows for rows in b.groups if not same([b.reward[i] for i in rows])]
    scores, loss, count = z_score(b, 1e-6), 0.0, 0
    kept = [i for rows in mixed for i in rows if not b.truncated[i]]
    for i in kept:
        for t in b.steps[i]:
            loss += ppo(exp(lp[i][t] - b.old[i][t]), scores[i], 0.2, 0.28)
            count += 1
    return {(i, t): scores[i] for i in kept for t in b.steps[i]}, loss / count


@reference
def gspo(b, lp, sg):
    a, loss = z_score(b, 1e-6), 0.0
    for i, steps in enumerate(b.steps):
        s = exp(sum(lp[i][t] - b.old[i][t] for t in steps) / len(steps))
        loss += ppo(s, a[i], 3e-4, 4e-4) / len(b.steps)
    return spread(b, a), loss


@reference
def cispo(b, lp, sg):
    scale = statistics.stdev(b.reward) + 1e-6
    a = {i: x / scale for i, x in centre(b, b.reward, group_mean).items()}
    weight = {(i, t): min(exp(sg[i][t] - b.old[i][t]), 5.0) for i, t in b.all}
    return spread(b, a), -sum(weight[i, t] * a[i] * lp[i][t] for i, t in b.all) / len(b.all)


def flow(b, lp, a, beta, width=1e-4):
    """A clip per denoising step, samples without advantage dropped; the KL is the stand-in's."""
    used = [(i, t) for i, t in b.all if a[i] != 0]
    loss = 0.0
    for i, t in used:
        kl = (lp[i][t] - b.ref[i][t]) ** 2 / 8
        loss += ppo(exp(lp[i][t] - b.old[i][t]), a[i], width, width) + beta * kl
    return {(i, t): a[i] for i, t in used}, loss / len(used)


@reference
def flow_grpo(b, lp, sg):
    return flow(b, lp, flow_advantage(b), 0.04)


@reference
def cps(b, lp, sg):
    return flow(b, lp, flow_advantage(b), 0.0)


@reference
def flow_grpo_fast(b, lp, sg):
    return flow(b, lp, flow_advantage(b), 0.0, 1e-5)


@reference
def flow_dppo(b, lp, sg):
    a, loss = flow_advantage(b), 0.0
    used = [(i, t) for i, t in b.all if a[i] != 0]
    for i, t in used:
        d = lp[i][t] - b.old[i][t]
        far = (sg[i][t] - b.old[i][t]) ** 2 / 8 >= 1e-5
        if not (far and a[i] * (sg[i][t] - b.old[i][t]) > 0):
            loss -= exp(d) * a[i]
    return {(i, t): a[i] for i, t in used}, loss / len(used)


@reference
def grpo_guard(b, lp, sg):
    sample, a, loss = clamped(z_score(b, 1e-4, statistics.pstdev)), {}, 0.0
    used = [(i, t) for i, t in b.all if sample[i] != 0]
    for i, t in used:
        a[i, t] = sample[i] / b.length[i][t]
        d = lp[i][t] - b.old[i][t]
        loss += ppo(exp(b.std[i][t] * (d + d**2 / 8)), a[i, t], 2e-6, 2e-6)
    return a, loss / len(used)


@reference
def tempflow_grpo(b, lp, sg):
    sample, a, loss = clamped(z_score(b, 1e-4, statistics.pstdev)), {}, 0.0
    used = [(i, t) for i, t in b.all if sample[i] != 0]
    for i, t in used:
        a[i, t] = sample[i] * b.std[i][t] / statistics.fmean(b.std[i])
        kl = (lp[i][t] - b.ref[i][t]) ** 2 / 8
        loss += ppo(exp(lp[i][t] - b.old[i][t]), a[i, t], 1e-4, 1e-4) + 0.004 * kl
    return a, loss / len(used)


@reference
def branch_grpo(b, lp, sg):
    """Without shared decisions: a z-score over the group's samples that reach a depth."""
    a, loss = dict.fromkeys(b.all, 0.0), 0.0
    for rows in b.groups:
        for t in {t for i in rows for t in b.steps[i]}:
            there = [i for i in rows if t in b.steps[i]]
            values = [b.reward[i] for i in there]
            scale = statistics.stdev(values) if len(values) > 1 else 0.0
            for i in there if scale >= 1e-6 else []:
                a[i, t] = (b.reward[i] - statistics.fmean(values)) / (scale + 1e-8)
    a = clamped(a)
    for i, t in b.all:
        loss += ppo(exp(lp[i][t] - b.old[i][t]), a[i, t], 1e-3, 1e-3)
    return a, loss / len(b.all)


@reference
def pref_grpo(b, lp, sg):
    rate = list(b.reward)
    for rows in b.groups:
        for i in rows:
            gaps = [b.reward[i] - b.reward[j] for j in rows]
            wins = [0.5 if same([b.reward[i], b.reward[j]]) else float(gap > 0)
                    for j, gap in zip(rows, gaps, strict=True)]  # fmt: skip
            rate[i] = (sum(wins) - 0.5) / (len(rows) - 1) if len(rows) > 1 else 0.5
    a, loss = clamped(z_score(replace(b, reward=rate), 1e-8)), 0.0
    for i, t in b.all:
        d = lp[i][t] - b.old[i][t]
        loss += ppo(exp(b.std[i][t] * (d + d**2 / 8)), a[i], 1e-4, 1e-4)
    return spread(b, a), loss / len(b.all)


@reference
def dance_grpo(b, lp, sg):
    a = clamped(z_score(b, 1e-8))
    terms = [ppo(exp(lp[i][t] - b.old[i][t]), a[i], 1e-4, 1e-4) for i, t in b.all]
    return spread(b, a), sum(terms) / len(terms)


# Presets that differ from another only in the rollout, or in what these batches do not have:
# shared decisions, several granularities, predictions of a best sample.
REFERENCES |= dict.fromkeys(("branch-grpo-mix", "branch-grpo-pruned"), branch_grpo)
REFERENCES |= dict.fromkeys(("mix-grpo", "mix-grpo-flash", "g2rpo", "dynamic-treerpo"), dance_grpo)


@reference
def zo_ranksgd(b, lp, sg):
    a = {}
    for rows in b.groups:
        order = sorted(rows, key=lambda i: -b.reward[i])
        edges = [(i, j) for place, i in enumerate(order[:4]) for j in order[place + 1 :]
                 if b.reward[i] > b.reward[j]]  # fmt: skip
        for i in rows:
            net = sum(i == x for x, _ in edges) - sum(i == y for _, y in edges)
            a[i] = net * len(rows) / len(edges) if edges else 0.0
    loss = -sum(a[i] * sum(lp[i][t] for t in s) / len(s) for i, s in enumerate(b.steps))
    return spread(b, a), loss / len(b.steps)


@reference
def ddpo(b, lp, sg):
    a, update = {}, (statistics.fmean(b.reward), statistics.pstdev(b.reward))
    for i, known in enumerate(b.history):
        mean, std = update if isnan(known[0]) else known
        a[i] = (b.reward[i] - mean) / (std + 1e-6)
    a = clamped(a)
    terms = [ppo(exp(lp[i][t] - b.old[i][t]), a[i], 1e-4, 1e-4) for i, t in b.all]
    return spread(b, a), sum(terms) / len(terms)


@reference
def dpok(b, lp, sg):
    loss = 0.0
    for i, t in b.all:
        kl = (lp[i][t] - b.ref[i][t]) ** 2 / 8
        loss += (-10 * b.reward[i] * lp[i][t] + 0.01 * kl) / len(b.steps)
    return spread(b, {i: 10 * r for i, r in enumerate(b.reward)}), loss


@reference
def loop(b, lp, sg):
    a = centre(b, b.reward, others)
    terms = [ppo(exp(lp[i][t] - b.old[i][t]), a[i], 1e-4, 1e-4) for i, t in b.all]
    return spread(b, a), sum(terms) / len(b.steps)


def difference_quotients(function, batch, log_prob, step=1e-6):
    """Central differences of the reference's loss in every trained log-probability."""
    frozen = [list(row) for row in log_prob]
    found = [[0.0] * len(row) for row in log_prob]
    for i, t in batch.all:
        losses = []
        for sign in (1, -1):
            moved = [list(row) for row in log_prob]
            moved[i][t] += sign * step
            losses.append(function(batch, moved, frozen)[1])
        found[i][t] = (losses[0] - losses[1]) / (2 * step)
    return found


@reference
def alto(b, lp, sg):
    a, loss = z_score(b, 0.1 + 1e-4), 0.0
    for i, t in b.all:
        d = lp[i][t] - b.ref[i][t]
        loss += (-a[i] * lp[i][t] + 0.001 * (exp(-d) + d - 1)) / len(b.all)
    return spread(b, a), loss


@reference
def maxrl(b, lp, sg):
    a = centre(b, b.reward, group_mean)
    for rows in b.groups:
        for i in rows:
            a[i] /= statistics.fmean(b.reward[j] for j in rows) + 1e-6
    loss = sum(ppo(exp(lp[i][t] - b.old[i][t]), a[i], 0.2, 0.2) for i, t in b.all)
    return spread(b, a), loss / len(b.all)


import image_scale_references  # noqa: E402, F401 - adds its own
import image_token_references  # noqa: E402, F401 - adds its own
import masked_references  # noqa: E402, F401 - adds its own
import matching_references  # noqa: E402, F401 - adds its own
import preference_references  # noqa: E402, F401 - adds its own
