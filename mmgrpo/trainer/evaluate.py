"""Evaluation on held-out prompts, with its own sampling settings and judge."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mmgrpo.core.collective import Collective
from mmgrpo.protocols import Sample
from mmgrpo.trainer.distributed import together
from mmgrpo.trainer.parts import Evaluator


def evaluate(
    evaluator: Evaluator, collective: Collective, *, step: int
) -> tuple[dict[str, float], list[Sample], dict[str, Tensor]]:
    """Sample every held-out prompt and score it.

    Returns:
        ``eval/<reward>`` and ``eval/success`` (the judge's mean) over all ranks, this rank's
        samples, and their scores.
    """
    start = time.perf_counter()
    samples = _sample(evaluator, collective, step)
    scores = together(collective, lambda: evaluator.scorer.score(samples, step=step))
    metrics: dict[str, float] = {}
    for name, value in scores.values.items():
        finite = value[torch.isfinite(value)].double()
        sums = torch.stack([finite.sum(), torch.ones_like(finite).sum()])
        total, count = collective.sum(sums).tolist()
        metrics[f"eval/{name}"] = total / count if count else float("nan")
    metrics["eval/success"] = metrics[f"eval/{evaluator.judge}"]
    metrics["time/eval_s"] = time.perf_counter() - start
    return metrics, samples, scores.values


def _sample(evaluator: Evaluator, collective: Collective, step: int) -> list[Sample]:
    """Samples of this rank's share of the prompts, drawn in batches."""
    prompts = list(evaluator.prompts.all(evaluator.limit))[collective.rank :: collective.size]
    size = max(1, evaluator.batch // evaluator.samples)
    samples: list[Sample] = []
    for first in range(0, len(prompts), size):
        rollout = evaluator.engine.generate(
            prompts[first : first + size],
            group_size=evaluator.samples,
            seed=evaluator.seed,
            version=step,
        )
        samples += rollout.samples
    return samples
