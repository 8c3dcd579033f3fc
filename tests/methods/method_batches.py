"""Awkward batches that every preset can run on: ragged, off-policy, with holes and garbage."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mmgrpo.core import Collective, Trajectories, denominators
from mmgrpo.methods import list_presets, load_method
from mmgrpo.protocols import Evaluation

PRESETS = list_presets()
VARIANTS = {
    "grpo with gdpo": ("grpo", {"reward": {"combine": "gdpo"}}),
    "grpo whitened by sample": ("grpo", {"advantage": {"whiten": "samples", "unbiased": True}}),
    "grpo over the batch's centred std": ("grpo", {"advantage": {"scale": "batch_centred"}}),
    "grpo by segment": ("grpo", {"ratio": {"name": "segment", "product": True}}),
    "dapo with more clips": ("dapo", {"trust_region": {"dual": 1.6, "delta": 1.9}}),
    "dr-grpo with entropy": ("dr-grpo", {"regulariser": {"entropy": 0.01}}),
    "var-grpo by scale": ("var-grpo", {"aggregate": "sequence_mean_segment_mean"}),
    "d3po on whole samples": ("d3po", {"objective": {"name": "preference", "mean": True}}),
}
"""Options that no preset sets, under a name of their own."""
GROUP_SIZES = (4, 3, 5, 2, 4, 1)
UNIFORM_GROUP = 11
"""Id of the group whose rewards are all equal."""
WIDTH = 6
DIRECTION = (1.0, -0.5)
"""In which the stand-in's predictions move when its log-probabilities rise."""
GARBAGE = 77.0
"""Stands wherever the mask is off; nothing may ever read it."""


@dataclass(frozen=True)
class Batch:
    """Unprepared trajectories and the log-probabilities under the policy that trains."""

    trajectories: Trajectories
    log_prob: torch.Tensor


def load_variant(name):
    """A preset, or one of the variants."""
    preset, overrides = VARIANTS.get(name, (name, {}))
    return load_method(preset, **overrides)


def make_batch(seed=0, dtype=torch.float64, *, on_policy=False, alone=False):
    """Ragged groups (one of them uniform), ragged lengths with holes, ratios away from kinks.

    Log-ratios are either far inside every published clip range (below 3e-5) or far outside.
    ``alone`` adds a group of one.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def uniform(*shape, low=0.0, high=1.0):
        draw = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return low + (high - low) * draw

    sizes = GROUP_SIZES if alone else GROUP_SIZES[:-1]
    index = torch.cat([torch.full((n,), g) for g, n in enumerate(sizes)])
    size = len(index)
    lengths = torch.randint(2, WIDTH + 1, (size,), generator=generator)
    mask = torch.arange(WIDTH) < lengths[:, None]
    mask[::3, 1] = False  # a tool's answer inside the sample
    far = uniform(size, 1) < 0.5  # samples far off policy; among them some decisions
    far = far & (uniform(size, WIDTH) < 0.7)
    sign = torch.where(uniform(size, WIDTH) < 0.5, -1.0, 1.0)
    step = torch.where(far, uniform(size, WIDTH, low=0.35, high=0.9), uniform(size, WIDTH) * 3e-5)
    step[::4, 0] = 2.0  # beyond CISPO's cap and the drift's
    old = uniform(size, WIDTH, low=-3.0, high=-0.2)
    reward = (uniform(size) * 4).round() / 4 + uniform(size) * 0.3

    def field(values):
        there = mask.reshape(*mask.shape, *(1,) * (values.dim() - 2))
        return torch.where(there, values, GARBAGE).to(dtype)

    group = index * 7 - 3
    reward[group == UNIFORM_GROUP] = 0.7
    trajectories = Trajectories(
        group=group,
        mask=mask,
        old_log_prob=field(old),
        ref_log_prob=field(old + uniform(size, WIDTH, low=-0.4, high=0.4)),
        rewards={"score": reward.to(dtype)},
        baseline_reward=uniform(len(sizes))[index].to(dtype),
        segment=torch.arange(WIDTH).expand(size, WIDTH) // 2,
        truncated=uniform(size) < 0.2,
        # of the schedule, hence known where nothing is trained too; so small that no guarded
        # ratio lies near its clip
        step_std=uniform(1, WIDTH, low=0.01, high=0.05).expand(size, WIDTH).to(dtype),
        step_length=field(uniform(1, WIDTH, low=0.05, high=0.2).expand(size, WIDTH)),
    )
    elements = (size, WIDTH, len(DIRECTION))
    trajectories = trajectories.replace(
        old_prediction=field(uniform(*elements, low=-1.0)),
        target=field(uniform(*elements, low=-1.0)),
        sigma=field(uniform(size, WIDTH, low=0.1)),
    )
    known = uniform(len(sizes))[index] < 0.6  # the other prompts have too short a history
    mean, std = uniform(len(sizes))[index], uniform(len(sizes), low=0.1)[index]
    trajectories = trajectories.replace(
        history_mean=mean.masked_fill(~known, torch.nan),
        history_std=std.masked_fill(~known, torch.nan),
    )
    trajectories = trajectories.replace(
        entropy_weight=field(uniform(size, WIDTH, low=-0.05, high=0.05)),
        ref_prediction=field(uniform(*elements, low=-1.0)),
        tokens=torch.randint(5, 50, (size,), generator=generator).to(dtype),
    )
    log_prob = old if on_policy else old + sign * step
    return Batch(trajectories, field(log_prob))


def evaluate(method, log_prob, trajectories):
    """A stand-in for what a policy's evaluation adds to the log-probabilities.

    A prediction moves from the old one along :data:`DIRECTION`, as far as the log-probability did.
    """

    def masked(x, fill=0.0):
        return torch.where(trajectories.mask, x, torch.full_like(x, fill))

    entropy = divergence = None
    if method.request.entropy:
        entropy = masked(masked(log_prob).clamp(max=50).exp() / 2, torch.nan)
    if method.request.divergence:
        target = method.request.divergence_target
        other = getattr(trajectories, f"{target}_log_prob", None)
        other = log_prob.detach() if other is None else other
        gap = masked(log_prob) - masked(other)
        divergence = masked(gap**2 / 8, torch.nan)
    prediction = None
    if method.request.prediction:
        old = trajectories.old_log_prob
        moved = log_prob - (log_prob.detach() if old is None else old)
        direction = torch.tensor(DIRECTION, dtype=moved.dtype)
        prediction = trajectories.old_prediction + moved[..., None] * direction
    return Evaluation(
        log_prob=log_prob, entropy=entropy, divergence=divergence, prediction=prediction
    )


def loss_and_gradient(method, batch, prepared=None, total=None):
    """Loss output and gradient in ``log_prob`` of prepared trajectories."""
    prepared = method.prepare(batch.trajectories) if prepared is None else prepared
    log_prob = batch.log_prob.clone().requires_grad_()
    output = method.loss(
        log_prob, prepared, evaluation=evaluate(method, log_prob, prepared), total=total
    )
    (gradient,) = torch.autograd.grad(output.loss, log_prob)
    return output, gradient


def select(batch, rows):
    """Some rows of a batch."""
    return Batch(batch.trajectories.select(rows), batch.log_prob[rows])


def relative_error(found, wanted):
    """Norm of the difference over the norm of what was wanted."""
    scale = wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny)
    return float((found - wanted).norm() / scale)


class Meeting:
    """Where the threads that play the ranks exchange their values."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=10)
        self.values = [None] * size

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class ThreadCollective(Collective):
    """One of several ranks, played by threads."""

    def __init__(self, rank, meeting):
        self.rank, self.meeting, self.size = rank, meeting, len(meeting.values)

    def sum(self, value):
        return sum(self.meeting.exchange(self.rank, value))

    def gather(self, value):
        return torch.cat(self.meeting.exchange(self.rank, value))


def run_ranks(method, parts):
    """Prepare and differentiate each rank's part; return prepared, total, loss, gradient each."""
    meeting = Meeting(len(parts))

    def work(rank, part):
        collective = ThreadCollective(rank, meeting)
        prepared = method.prepare(part.trajectories, collective=collective)
        total = denominators(prepared, collective)
        return prepared, total, *loss_and_gradient(method, part, prepared, total)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(work, range(len(parts)), parts))
