"""The report of one step: times, costs, rewards and the update's averages."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmgrpo.core.collective import Collective
from mmgrpo.core.groups import group_index, group_std, uniform_groups
from mmgrpo.core.mismatch import mismatch_metrics, sampled_log_probs
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.protocols import Cost
from mmgrpo.trainer.parts import Loss, MethodLike

WITHOUT_UPDATE = {
    "loss": 0.0,
    "kl": 0.0,
    "clip_fraction": 0.0,
    "ratio/mean": 1.0,
    "entropy": math.nan,
}
"""What a step reports where its method, or its having nothing to train, gives no number."""


class Report:
    """Collects one step's numbers; :meth:`finish` reduces them over ranks."""

    def __init__(self) -> None:
        self.times: dict[str, float] = defaultdict(float)
        self.sums: dict[str, float] = defaultdict(float)
        self.means: dict[str, tuple[float, float]] = {}
        self.values: dict[str, float] = {}
        self._loss_sums: dict[str, float] = defaultdict(float)
        self._updates = 0
        self._log_ratio = 0.0
        self._first_log_ratio = 0.0
        self._grad_norm = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] += time.perf_counter() - start

    def count(self, name: str, amount: float) -> None:
        """Add to a counter that is summed over ranks."""
        self.sums[name] += amount

    def value(self, name: str, value: float) -> None:
        """Record a value that is equal on all ranks."""
        self.values[name] = value

    def mean(self, name: str, x: torch.Tensor) -> None:
        """Record the mean of the finite entries of ``x``, weighted by their number over ranks."""
        finite = x[torch.isfinite(x)].double()
        self.means[name] = (float(finite.sum()), float(finite.numel()))

    def cost(self, cost: Cost) -> None:
        """Account for network calls and sampled decisions."""
        self.count("count/forward", cost.forwards)
        self.count("count/backward", cost.backwards)
        self.count("count/generated_decisions", cost.decisions)

    def rewards(self, method: MethodLike, trajectories: Trajectories) -> None:
        """Statistics of what was sampled and scored, over rows that have decisions."""
        rows = trajectories.mask.any(dim=1)
        score, group = method.score(trajectories)[rows], trajectories.group[rows]
        self.mean("reward/mean", score)
        for name, reward in trajectories.rewards.items():
            self.mean(f"reward/{name}", reward[rows])
        self.mean("reward/group_std", group_std(score.double(), group))
        index, count = group_index(group)
        uniform = torch.zeros(count, device=group.device)
        uniform[index] = uniform_groups(score, group).float()
        self.mean("groups/uniform_fraction", uniform)
        self.mean("length/mean", trajectories.lengths[rows].float())
        if trajectories.truncated is not None:
            self.mean("length/truncated_fraction", trajectories.truncated[rows].float())
        if trajectories.entropy is not None:
            self.mean("entropy", trajectories.entropy[trajectories.mask])

    def mismatch(self, trajectories: Trajectories, collective: Collective) -> None:
        """How far a separate engine was from the policy, over all ranks; nothing without one."""
        found = sampled_log_probs(trajectories)
        if found is not None:
            self.values.update(mismatch_metrics(collective.gather(found)))

    def loss(self, output: Loss, *, scale: float = 1.0) -> None:
        """Add one micro-batch's share of the update's averages.

        Args:
            output: the micro-batch's loss.
            scale: decisions of the update over those that were evaluated; the averages are over
                the latter, the loss is over all.
        """
        for name, value in output.metrics.items():
            self._loss_sums[name] += value if name == "loss" else value * scale
        self._log_ratio = max(self._log_ratio, output.max_log_ratio)

    def update_done(self, grad_norm: float) -> None:
        """Close one optimiser step."""
        if self._updates == 0:
            self._first_log_ratio = self._log_ratio
        self._updates += 1
        self._grad_norm += grad_norm

    def finish(self, collective: Collective) -> dict[str, float]:
        """All metrics of the step; all but the times are equal on every rank."""
        updates = max(1, self._updates)
        metrics = {**WITHOUT_UPDATE, **self.values}
        names = sorted(self.means)
        pairs = collective.sum(torch.tensor([self.means[n] for n in names]).double())
        for name, (total, count) in zip(names, pairs.tolist(), strict=True):
            metrics[name] = total / count if count else math.nan
        summed = {**self.sums, **{n: v / updates for n, v in self._loss_sums.items()}}
        keys = sorted(summed)
        totals = collective.sum(torch.tensor([summed[k] for k in keys]).double())
        metrics.update(zip(keys, totals.tolist(), strict=True))
        metrics["grad_norm"] = self._grad_norm / updates
        deviation = collective.gather(torch.tensor([self._first_log_ratio])).max()
        metrics["ratio/first_max_deviation"] = math.expm1(float(deviation))
        metrics.update(self.times)
        metrics["time/step_s"] = time.perf_counter() - self._start
        return metrics
