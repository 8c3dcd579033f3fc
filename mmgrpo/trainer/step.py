"""One training step: sample, score, credit, update, report. Start reading here.

Only the engine (sample), the rewards (score) and the policy's evaluate() differ between a text, a
vision and a flow model.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from mmgrpo.config.schema import Config
from mmgrpo.core.aggregation import denominators
from mmgrpo.core.groups import uniform_groups
from mmgrpo.core.seeding import mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.protocols import Cost, Request
from mmgrpo.trainer.distributed import evaluate_through
from mmgrpo.trainer.metrics import Report
from mmgrpo.trainer.optim import learning_rate_at, set_learning_rate
from mmgrpo.trainer.parts import Collected, Parts, State


def train_step(parts: Parts, state: State, config: Config) -> tuple[dict[str, Any], Collected]:
    """Run one step and return its metrics and what was sampled. ``state`` advances in place."""
    report = Report()
    collected = collect(parts, state, config, report)
    trajectories = credit(parts, collected.trajectories, config, report)
    update(parts, trajectories, state, config, report)
    state.step += 1
    return report.finish(parts.collective), collected


def collect(parts: Parts, state: State, config: Config, report: Report) -> Collected:
    """Sample and score until enough groups have spread (dynamic sampling), or rounds run out."""
    sampler = parts.method.sampler
    share = config.rollout.prompts_per_step // parts.collective.size
    rounds: list[Collected] = []
    while True:
        collected = score(parts, sample(parts, state, config, report), state, report)
        rounds.append(collected)
        valid = sum(int(_diverse_groups(parts, r.trajectories).sum()) for r in rounds)
        short = parts.collective.sum(torch.tensor(float(valid < sampler.valid_fraction * share)))
        if not float(short) or len(rounds) >= sampler.max_rounds:
            break
    merged = _merge(parts, rounds, share)
    report.rewards(parts, merged.trajectories)
    return merged


def sample(parts: Parts, state: State, config: Config, report: Report) -> Collected:
    """Draw prompts and let the engine sample a group for each."""
    with report.timer("time/rollout_s"):
        prompts = parts.prompts.batch(
            state.draws,
            config.rollout.prompts_per_step,
            rank=parts.collective.rank,
            world=parts.collective.size,
        )
        seed = mix_seed(config.seed, state.draws)
        state.draws += 1
        rollout = parts.engine.generate(
            prompts, group_size=config.rollout.group_size, seed=seed, version=state.updates
        )
        report.cost(rollout.cost)
        trajectories = rollout.trajectories
        if parts.greedy_engine is not None:
            greedy = parts.greedy_engine.generate(
                prompts, group_size=1, seed=seed, version=state.updates
            )
            report.cost(greedy.cost)
            trajectories = _with_baseline(parts, trajectories, greedy, state)
        return Collected(trajectories, rollout.samples)


def score(parts: Parts, collected: Collected, state: State, report: Report) -> Collected:
    """Let every reward look at the samples; a failing reward stops the run or drops the sample."""
    with report.timer("time/reward_s"):
        scores = parts.scorer.score(collected.samples, step=state.step)
    trajectories = collected.trajectories.replace(rewards=scores.values)
    report.count("count/reward_calls", len(collected.samples))
    if not bool(scores.dropped.any()):
        return Collected(trajectories, collected.samples)
    kept = (~scores.dropped).nonzero().squeeze(1)
    report.count("count/dropped_samples", int(scores.dropped.sum()))
    return Collected(trajectories.select(kept), [collected.samples[i] for i in kept.tolist()])


def credit(
    parts: Parts, trajectories: Trajectories, config: Config, report: Report
) -> Trajectories:
    """Add what the method needs from the reference, then turn rewards into advantages."""
    needs = parts.method.needs
    with report.timer("time/update_s"), torch.no_grad():
        if needs & {"ref_log_prob", "ref_prediction"}:
            with parts.policy.reference():
                trajectories = _record(parts, trajectories, config, report, prefix="ref")
        if "old_prediction" in needs:
            trajectories = _record(parts, trajectories, config, report, prefix="old")
        return parts.method.prepare(trajectories, collective=parts.collective)


def update(
    parts: Parts, trajectories: Trajectories, state: State, config: Config, report: Report
) -> None:
    """Take the optimiser steps of one rollout: epochs x minibatches of whole groups."""
    settings = config.trainer
    total_updates = settings.steps * settings.epochs * settings.minibatches
    with report.timer("time/update_s"):
        for epoch in range(settings.epochs):
            seed = mix_seed(config.seed, state.step, epoch, 7)
            for rows in minibatches(trajectories.group, settings.minibatches, seed):
                rate = learning_rate_at(
                    state.updates,
                    base=settings.learning_rate,
                    schedule=settings.lr_schedule,
                    warmup=settings.warmup_steps,
                    total=total_updates,
                )
                set_learning_rate(parts.optimizer, rate)
                _optimise(parts, trajectories.select(rows), config, report)
                state.updates += 1
    report.value("learning_rate", rate)


def _optimise(parts: Parts, batch: Trajectories, config: Config, report: Report) -> None:
    """One optimiser step on one minibatch, accumulated over micro-batches."""
    total = denominators(batch, parts.collective)
    micro_batches = torch.arange(len(batch)).split(config.trainer.micro_batch_size or len(batch))
    for i, rows in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else parts.accelerator.no_sync(parts.network):
            micro = batch.select(rows)
            before = parts.policy.forwards
            evaluation = evaluate_through(parts.network, micro, parts.method.request)
            output = parts.method.loss(
                evaluation.log_prob, micro, evaluation=evaluation, total=total
            )
            # DDP averages gradients over ranks; the denominators are already global.
            parts.accelerator.backward(output.loss * parts.collective.size)
            report.cost(Cost(forwards=parts.policy.forwards - before, backwards=1))
            report.loss(output)
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    norm = parts.accelerator.clip_grad_norm_(parameters, config.trainer.max_grad_norm)
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    for weights in parts.second_weights.values():
        weights.update()
    report.update_done(float(norm))


def minibatches(group: torch.Tensor, count: int, seed: int) -> list[torch.Tensor]:
    """Split rows into ``count`` minibatches of whole groups, in an order drawn from ``seed``.

    Rows of a group stay adjacent and in order, so that shared prompts are evaluated together.
    """
    ids, index = torch.unique(group, return_inverse=True)
    if count <= 1:
        return [torch.arange(len(group))]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return [
        torch.cat([(index == g).nonzero().squeeze(1) for g in part.tolist()])
        for part in order.tensor_split(min(count, len(ids)))
    ]


def _record(
    parts: Parts, trajectories: Trajectories, config: Config, report: Report, *, prefix: str
) -> Trajectories:
    """Store log-probabilities and predictions under the weights that are active now."""
    wants = f"{prefix}_prediction" in parts.method.needs
    micro_batches = torch.arange(len(trajectories)).split(
        config.trainer.micro_batch_size or len(trajectories)
    )
    before = parts.policy.forwards
    parts_ = [
        parts.policy.evaluate(trajectories.select(rows), Request(prediction=wants))
        for rows in micro_batches
    ]
    report.cost(Cost(forwards=parts.policy.forwards - before))
    changes = {f"{prefix}_log_prob": torch.cat([part.log_prob for part in parts_])}
    if wants:
        changes[f"{prefix}_prediction"] = torch.cat([part.prediction for part in parts_])
    if prefix == "old":
        changes.pop("old_log_prob")
    return trajectories.replace(**changes)


def _with_baseline(
    parts: Parts, trajectories: Trajectories, greedy: Any, state: State
) -> Trajectories:
    scores = parts.scorer.score(greedy.samples, step=state.step)
    rewards = parts.method.score(greedy.trajectories.replace(rewards=scores.values))
    by_group = dict(zip(greedy.trajectories.group.tolist(), rewards.tolist(), strict=True))
    baseline = torch.tensor([by_group[g] for g in trajectories.group.tolist()])
    return trajectories.replace(baseline_reward=baseline)


def _diverse_groups(parts: Parts, trajectories: Trajectories) -> torch.Tensor:
    """``[P]`` bool: which groups of a rollout have spread in their raw reward."""
    diverse = ~uniform_groups(parts.method.score(trajectories), trajectories.group)
    ids, index = torch.unique(trajectories.group, return_inverse=True)
    result = torch.zeros(len(ids), dtype=torch.bool)
    result[index] = diverse
    return result


def _merge(parts: Parts, rounds: list[Collected], share: int) -> Collected:
    """Keep ``share`` groups: those with spread first, in the order in which they were drawn."""
    if len(rounds) == 1:
        return rounds[0]
    trajectories = Trajectories.cat([r.trajectories for r in rounds])
    samples = [s for r in rounds for s in r.samples]
    seen: list[int] = list(dict.fromkeys(trajectories.group.tolist()))
    diverse = ~uniform_groups(parts.method.score(trajectories), trajectories.group)
    spread = dict(zip(trajectories.group.tolist(), diverse.tolist(), strict=True))
    chosen = sorted(seen, key=lambda g: (not spread[g], seen.index(g)))[:share]
    keep = torch.isin(trajectories.group, torch.tensor(chosen)).nonzero().squeeze(1)
    return Collected(trajectories.select(keep), [samples[i] for i in keep.tolist()])
