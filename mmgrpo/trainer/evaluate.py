"""Evaluation on held-out prompts, with its own sampling settings and judge."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mmgrpo.core.collective import Collective
from mmgrpo.protocols import Sample
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
    prompts = list(evaluator.prompts.all(evaluator.limit))[collective.rank :: collective.size]
    rollout = evaluator.engine.generate(
        prompts, group_size=evaluator.samples, seed=evaluator.seed, version=step
    )
    scores = evaluator.scorer.score(rollout.samples, step=step)
    metrics: dict[str, float] = {}
    for name, value in scores.values.items():
        finite = value[torch.isfinite(value)].double()
        pair = torch.stack([finite.sum(), torch.tensor(float(finite.numel())).double()])
        total, count = collective.sum(pair).tolist()
        metrics[f"eval/{name}"] = total / count if count else float("nan")
    metrics["eval/success"] = metrics[f"eval/{evaluator.judge}"]
    metrics["time/eval_s"] = time.perf_counter() - start
    return metrics, rollout.samples, scores.values
