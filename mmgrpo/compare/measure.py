"""What a finished run is measured by, beside its own metrics: samples of its last weights.

Every run is measured alike, whatever its method: the same held-out prompts, the same number of
samples at the rollout's temperature (tokens) or with Flow-GRPO's sampler (images), the same judge.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmgrpo import build
from mmgrpo.compare.execute import write_measures
from mmgrpo.config import Config, load_config
from mmgrpo.core.groups import group_mean
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods import load_method
from mmgrpo.methods.checks import DENOISING
from mmgrpo.protocols import Sample
from mmgrpo.tracking import read_metrics
from mmgrpo.trainer.run_folder import checkpoints

SAMPLES = 8
"""Samples per held-out prompt."""
SAMPLER = "flow-grpo"
"""The preset whose sampler draws the decisions of flow models that the KL is measured on."""
SUMS = (
    "count/generated_decisions", "count/forward", "count/backward", "count/reward_calls",
    "time/rollout_s", "time/reward_s", "time/update_s", "time/step_s",
)  # fmt: skip


def measure(run_dir: Path) -> dict[str, float]:
    """Measure a finished run: its own metrics, then pass@1, pass@k, KL, entropy and length."""
    config = load_config(run_dir / "config.yaml")
    return {**from_metrics(read_metrics(run_dir / "metrics.jsonl")), **from_samples(config)}


def from_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """First and last success, the last reward and uniform fraction, and the summed costs."""
    success = [row["eval/success"] for row in rows if row.get("eval/success") is not None]
    last = rows[-1]
    sums = {name: sum(row.get(name) or 0.0 for row in rows) for name in SUMS}
    return {
        "success/first": success[0] if success else math.nan,
        "success/last": success[-1] if success else math.nan,
        "reward/last": last.get("reward/mean", math.nan),
        "groups/uniform_fraction": last.get("groups/uniform_fraction", math.nan),
        **sums,
    }


def from_samples(config: Config) -> dict[str, float]:
    """Sample the last checkpoint on the held-out prompts and compare with the initial weights."""
    saved = checkpoints(Path(config.run_dir))
    denoises = config.modality in DENOISING
    method = load_method(SAMPLER) if denoises else build.make_method(config)
    trained = build.load_policy(config, method, saved[-1])
    evaluator = build.make_evaluator(config, trained, method, build.make_rewards(config))
    assert evaluator is not None  # every playground task has held-out prompts
    engine = build.modality_of(config).engine(trained, config, method, "train")
    prompts = list(evaluator.prompts.all(evaluator.limit))
    rollout = engine.generate(prompts, group_size=SAMPLES, seed=build.EVAL_SEED + 1)
    judged = evaluator.scorer.score(rollout.samples, step=0).values[evaluator.judge]
    initial = build.make_policy(config, method)
    with torch.no_grad():
        start = initial.evaluate(rollout.trajectories).log_prob
    return {
        "pass@1": float(judged.nanmean()),
        f"pass@{SAMPLES}": pass_at_all(judged, rollout.trajectories.group),
        **({"diversity": diversity(rollout.samples)} if denoises else {}),
        **from_trajectories(rollout.trajectories, start),
    }


def diversity(samples: Sequence[Sample]) -> float:
    """How much pictures of one prompt differ: root mean square over pixels in [0, 1] and pairs."""
    prompts: dict[int, list[np.ndarray]] = defaultdict(list)
    for sample in samples:
        frames = sample.video if sample.image is None else [sample.image]
        assert frames is not None  # the modality draws
        prompts[sample.prompt.index].append(np.stack([np.asarray(f) for f in frames]) / 255)
    # Over all pairs of one prompt the mean square difference is twice the unbiased variance.
    squares = [2 * float(np.var(p, axis=0, ddof=1).mean()) for p in prompts.values() if len(p) > 1]
    return math.sqrt(math.fsum(squares) / len(squares)) if squares else math.nan


def pass_at_all(judged: Tensor, group: Tensor) -> float:
    """Share of prompts of which at least one sample succeeds (value at least 0.5)."""
    solved = group_mean((judged >= 0.5).double(), group) > 0
    return float(group_mean(solved.double(), group).mean())


def from_trajectories(trajectories: Trajectories, start: Tensor) -> dict[str, float]:
    """KL from the initial weights per sample (k1 on its own samples), entropy and length.

    Args:
        trajectories: sampled from the trained weights.
        start: ``[B, T]`` log-probabilities of the decisions under the initial weights. Those of
            flow models are means over the latent elements, and so is their KL.
    """
    mask = trajectories.mask
    assert trajectories.old_log_prob is not None
    ratio = torch.where(mask, trajectories.old_log_prob - start, torch.zeros_like(start))
    measures = {
        "kl_from_start": float(ratio.sum(dim=1).mean()),
        "length": float(trajectories.lengths.float().mean()),
    }
    if trajectories.entropy is not None:
        measures["entropy"] = float(trajectories.entropy[mask].mean())
    return measures


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_measures(folder, measure(folder))
