"""One training step: sample, score, credit, update, report. Start reading here.

Only the engine (sample), the rewards (score) and the policy's evaluate() differ between a text, a
vision and a flow model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from mmgrpo.config.schema import Config
from mmgrpo.core.aggregation import denominators
from mmgrpo.core.groups import group_index, uniform_groups
from mmgrpo.core.seeding import mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MmgrpoError
from mmgrpo.protocols import AheadScorer, Cost, Prompt, Request, Sample, Scorer
from mmgrpo.trainer.batches import (
    choose_groups,
    micro_batches,
    minibatches,
    trained,
    without_idle,
    without_repeats,
)
from mmgrpo.trainer.distributed import anchored, evaluate_through, together
from mmgrpo.trainer.history import remember
from mmgrpo.trainer.metrics import Report
from mmgrpo.trainer.optim import learning_rate_at
from mmgrpo.trainer.parts import Collected, Parts, State


def train_step(parts: Parts, state: State, config: Config) -> Collected:
    """Run one step and return what was sampled, with its advantages.

    ``state`` advances in place, and then holds the step's metrics.
    """
    report = Report()
    collected = collect(parts, state, config, report)
    trajectories = credit(parts, collected.trajectories, config, report)
    update(parts, trajectories, state, config, report)
    if parts.history is not None:
        parts.history.commit()
    state.step += 1
    state.metrics = {"step": state.step, **report.finish(parts.collective)}
    state.decisions += state.metrics["count/generated_decisions"]
    state.seconds += state.metrics["time/step_s"]
    return Collected(trajectories, collected.samples)


def collect(parts: Parts, state: State, config: Config, report: Report) -> Collected:
    """Sample and score until enough groups have spread (dynamic sampling), or rounds run out."""
    sampler, size = parts.method.sampler, config.rollout.prompts_per_step
    rounds: list[Collected] = []
    while True:
        rounds.append(score(parts, sample(parts, state, config, report), state, report))
        merged = Collected.cat(rounds)
        spread = _has_spread(parts, merged.trajectories)
        groups = torch.unique(merged.trajectories.group[spread])
        found = float(parts.collective.sum(torch.tensor(float(len(groups)))))
        if found >= sampler.valid_fraction * size or len(rounds) >= sampler.max_rounds:
            break
    if len(rounds) > 1:
        merged = choose_groups(merged, spread, size, parts.collective)
    report.rewards(parts.method, merged.trajectories)
    report.mismatch(merged.trajectories, parts.collective)
    return remember(parts, merged)


def sample(parts: Parts, state: State, config: Config, report: Report) -> Collected:
    """Draw prompts and let the engine sample a group for each."""
    rank, world = parts.collective.rank, parts.collective.size
    size = config.rollout.prompts_per_step
    with report.timer("time/rollout_s"):
        prompts = parts.prompts.batch(state.draws, size, rank=rank, world=world)
        seed, first = mix_seed(config.seed, state.draws), state.draws * size + rank * size // world
        state.draws += 1
        greedy, ahead = None, _ahead(parts, prompts, config)
        announced: dict[str, Any] = {} if ahead is None else {"on_samples": ahead.add}
        with parts.sampling_weights:
            rollout = parts.engine.generate(
                prompts,
                group_size=config.rollout.group_size,
                seed=seed,
                version=state.updates,
                iteration=state.step,
                **announced,
            )
            report.cost(rollout.cost)
            if parts.greedy_engine is not None:
                greedy = parts.greedy_engine.generate(prompts, group_size=1, seed=seed)
                report.cost(greedy.cost)
    number = {prompt.index: first + place for place, prompt in enumerate(prompts)}
    group = rollout.trajectories.group
    numbered = torch.tensor([number[index] for index in group.tolist()], device=group.device)
    return Collected(rollout.trajectories.replace(group=numbered), rollout.samples, greedy, ahead)


def score(parts: Parts, collected: Collected, state: State, report: Report) -> Collected:
    """Let every reward look at the samples; a failing reward stops the run or drops the sample."""
    samples, greedy = collected.samples, collected.greedy
    with report.timer("time/reward_s"):
        scorer = collected.ahead or parts.scorer
        trajectories, kept = _reward(parts, scorer, collected.trajectories, samples, state, report)
        if greedy is not None:
            rewarded, valid = _reward(
                parts, parts.scorer, greedy.trajectories, greedy.samples, state, report
            )
            baseline = parts.method.score(rewarded).masked_fill(~valid, math.nan)
            place, _ = group_index(trajectories.group)
            trajectories = trajectories.replace(baseline_reward=baseline[place])
    rows = kept.nonzero().squeeze(1)
    return Collected(trajectories.select(rows), [samples[i] for i in rows.tolist()])


def credit(
    parts: Parts, trajectories: Trajectories, config: Config, report: Report
) -> Trajectories:
    """Add what the method needs of the reference, then turn rewards into advantages."""
    needs = parts.method.needs
    with report.timer("time/update_s"), torch.no_grad():
        predicted = "old_prediction" in needs
        if parts.method.reads_reference:
            with parts.policy.reference():
                trajectories = _record(
                    parts, trajectories, config, report, "ref", "ref_prediction" in needs
                )
        if trajectories.old_log_prob is None:
            once = predicted and (parts.old is None or parts.old_samples)
            with parts.sampling_weights:
                trajectories = _record(parts, trajectories, config, report, "old", once)
        if predicted and trajectories.old_prediction is None:
            with parts.old_weights:
                trajectories = _record(parts, trajectories, config, report, "old", True)
        return parts.method.prepare(trajectories, collective=parts.collective)


def update(
    parts: Parts, trajectories: Trajectories, state: State, config: Config, report: Report
) -> None:
    """Take the optimiser steps of one rollout: epochs x minibatches of whole groups."""
    settings = config.trainer
    with report.timer("time/update_s"):
        for epoch in range(settings.epochs):
            seed = mix_seed(config.seed, state.step, epoch)
            group, count = trajectories.group, settings.minibatches
            for rows in minibatches(group, count, seed, parts.collective):
                rate = learning_rate_at(
                    state.updates,
                    base=settings.learning_rate,
                    schedule=settings.lr_schedule,
                    warmup=settings.warmup_steps,
                    total=settings.steps * settings.epochs * count,
                )
                optimise(parts, trained(trajectories, rows), rate, config, report)
                state.updates += 1
                report.value("learning_rate", rate)


def optimise(
    parts: Parts, batch: Trajectories, rate: float, config: Config, report: Report
) -> None:
    """Take one optimiser step; nothing moves where no rank has a decision to train."""
    total = denominators(batch, parts.collective)
    if total.decisions < 0.5:
        return
    control = parts.entropy_control
    if control is not None:
        batch = control.weigh(batch, parts.collective)
    fewer = without_idle(batch, parts.method, total) if config.speed.skip_idle else batch
    evaluated = denominators(fewer, parts.collective).decisions
    if evaluated < 0.5:
        fewer, evaluated = batch, total.decisions
    whole_groups = "whole_groups" in parts.method.needs
    cut = len(_pieces(fewer, config, whole_groups)) > 1
    batch = without_repeats(fewer, parts.method, cut=cut)
    pieces = _pieces(batch, config, whole_groups)
    for number, rows in enumerate(pieces, start=1):
        last = number == len(pieces)
        with nullcontext() if last else parts.accelerator.no_sync(parts.network):
            micro, before = batch.select(rows), parts.policy.forwards
            evaluation = evaluate_through(parts.network, micro, parts.method.request)
            output = parts.method.loss(
                evaluation.log_prob, micro, evaluation=evaluation, total=total
            )
            # DDP averages gradients over ranks; the denominators are global already.
            loss = anchored(output.loss, parts.optimizer.parameters) * parts.collective.size
            parts.accelerator.backward(loss)
            report.cost(Cost(forwards=parts.policy.forwards - before, backwards=1))
            report.loss(output, scale=total.decisions / evaluated)
            if control is not None and evaluation.entropy is not None:
                control.observe(micro, evaluation.entropy)
    limit = config.trainer.max_grad_norm or math.inf
    norm = float(parts.accelerator.clip_grad_norm_(parts.optimizer.parameters.values(), limit))
    if not math.isfinite(norm):
        raise MmgrpoError(
            "the gradient is not finite, so the weights were left as they are: training has "
            "diverged or a number overflows in model.dtype; try a smaller learning rate or float32."
        )
    parts.optimizer.step(rate)
    for weights in parts.second_weights.values():
        weights.update()
    if control is not None:
        for name, value in control.update(parts.collective).items():
            report.value(name, value)
    report.update_done(grad_norm=norm)


def _pieces(
    batch: Trajectories, config: Config, whole_groups: bool = False
) -> Sequence[torch.Tensor]:
    """Return the rows of each forward pass."""
    return micro_batches(
        batch,
        config.trainer.micro_batch_size,
        decisions=config.speed.micro_batch_decisions,
        whole_groups=whole_groups,
    )


def _record(
    parts: Parts,
    trajectories: Trajectories,
    config: Config,
    report: Report,
    prefix: str,
    prediction: bool,
) -> Trajectories:
    """Store what is missing of the log-probabilities under the active weights, and predictions."""
    request = Request(prediction=prediction)
    before = parts.policy.forwards
    found = [
        parts.policy.evaluate(trajectories.select(rows), request)
        for rows in _pieces(trajectories, config)
    ]
    report.cost(Cost(forwards=parts.policy.forwards - before))
    changes = {}
    if getattr(trajectories, f"{prefix}_log_prob") is None:  # an old one mostly is the rollout's
        changes[f"{prefix}_log_prob"] = torch.cat([one.log_prob for one in found])
    if request.prediction:
        predictions = [one.prediction for one in found if one.prediction is not None]
        changes[f"{prefix}_prediction"] = torch.cat(predictions)
    return trajectories.replace(**changes)


def _ahead(parts: Parts, prompts: Sequence[Prompt], config: Config) -> AheadScorer | None:
    """What scores groups while the engine is at others, where there is one and it is wanted."""
    wanted = config.speed.overlap_rewards
    announces = wanted and getattr(parts.engine, "announces", False)
    return parts.scorer.ahead(prompts, sync=wanted is True) if announces else None


def _reward(
    parts: Parts,
    scorer: Scorer | AheadScorer,
    trajectories: Trajectories,
    samples: Sequence[Sample],
    state: State,
    report: Report,
) -> tuple[Trajectories, torch.Tensor]:
    """Return the trajectories with their rewards, and ``[B]`` bool: where no reward failed."""
    step, device = state.step + 1, trajectories.group.device
    scores = together(parts.collective, lambda: scorer.score(samples, step=step))
    report.count("count/reward_calls", len(samples))
    report.count("count/dropped_samples", int(scores.dropped.sum()))
    rewards = {name: values.to(device) for name, values in scores.values.items()}
    return trajectories.replace(rewards=rewards), ~scores.dropped.to(device)


def _has_spread(parts: Parts, trajectories: Trajectories) -> torch.Tensor:
    """``[B]`` bool: the raw rewards of the sample's group are not all equal."""
    return ~uniform_groups(parts.method.score(trajectories), trajectories.group)
