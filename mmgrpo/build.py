"""Assembly: the one place that turns a configuration into objects, and the doors' verbs.

Everything that can be wrong is looked at before anything is written.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmgrpo.checks import check_method, check_prompts, check_reference, check_trackers
from mmgrpo.config import Config, dump_config
from mmgrpo.config.schema import Reward
from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.entropy_control import EntropyControl
from mmgrpo.data import PromptSource, check_columns, read_prompts
from mmgrpo.errors import ConfigError, MissingResourceError, ModelError
from mmgrpo.methods import Method, load_method
from mmgrpo.methods.components import with_default
from mmgrpo.modalities import Modality
from mmgrpo.plan import checkpointing, describe
from mmgrpo.policies.adapters import Ema, trainable_parameters
from mmgrpo.policies.checkpoint_bank import CheckpointBank
from mmgrpo.policies.perturbed import PerturbationPayload, PerturbedPolicy
from mmgrpo.protocols import Policy, Prompt, Tracker
from mmgrpo.registry import resolve
from mmgrpo.rollout.perturbed import PerturbedEngine
from mmgrpo.scoring import NamedReward, RewardRunner, check_modality, load_reward, load_rewards
from mmgrpo.tracking import Console, JsonlTracker, write_samples, write_summary
from mmgrpo.trainer.distributed import (
    EvaluationModule,
    any_rank,
    make_accelerator,
    make_collective,
)
from mmgrpo.trainer.evaluate import evaluate as run_evaluation
from mmgrpo.trainer.history import RewardHistory
from mmgrpo.trainer.loop import fit
from mmgrpo.trainer.memory import keep_freed_memory
from mmgrpo.trainer.optim import Optimizer
from mmgrpo.trainer.parts import Evaluator, Parts
from mmgrpo.trainer.quiet import silence
from mmgrpo.trainer.run_folder import check_run_folder, open_run_folder

logger = logging.getLogger(__name__)

EVAL_SEED = 0
"""Names the noise of evaluations: the same in every run, so that runs can be compared."""


def train(config: Config) -> dict[str, Any]:
    """Train, or resume, the run that ``config`` describes; return the last step's metrics."""
    return run(assemble(config), config)


def run(parts: Parts, config: Config) -> dict[str, Any]:
    """Open the run folder, connect the trackers and loop."""
    run_dir = Path(config.run_dir)
    parts.accelerator.wait_for_everyone()  # until every rank has checked its input
    if parts.accelerator.is_main_process:
        open_run_folder(run_dir, dump_config(config))
        parts.trackers = make_trackers(config)
        parts.write_samples = partial(write_samples, run_dir)
        parts.finish = write_summary
    parts.accelerator.wait_for_everyone()
    try:
        return fit(parts, config)
    finally:
        for tracker in parts.trackers:
            tracker.close()


def evaluate(config: Config, checkpoint: str | Path) -> dict[str, float]:
    """Evaluate a checkpoint's weights on ``data.eval``; nothing is written."""
    method = make_method(config)
    rewards = make_rewards(config)
    policy = load_policy(config, method, checkpoint)
    evaluator = make_evaluator(config, policy, method, rewards)
    if evaluator is None:
        raise ConfigError("data.eval is not set: evaluation needs held-out prompts.")
    return run_evaluation(evaluator, LOCAL, step=0)[0]


def sample(config: Config, checkpoint: str | Path, out: str | Path) -> Path:
    """Sample held-out (or training) prompts from a checkpoint; write transcripts or images."""
    method = make_method(config)
    prompts = load_prompts(config, config.data.eval or config.data.train)[: config.eval.prompts]
    rewards = make_rewards(config)
    scorer = make_scorer(rewards, config, prompts)
    policy = load_policy(config, method, checkpoint)
    engine = modality_of(config).engine(policy, config, method, "eval")
    rollout = engine.generate(prompts, group_size=config.eval.samples, seed=EVAL_SEED)
    scores = scorer.score(rollout.samples, step=0)
    return write_samples(
        Path(out), 0, rollout.samples, rewards=scores.values, max_samples=len(rollout.samples)
    )


def plan(config: Config) -> str:
    """What the run would do and cost; nothing is loaded or written."""
    method = make_method(config)
    check_method(method, config)
    check_run_folder(config)
    check_trackers(config)
    judge = [config.eval.judge] if config.eval.judge else []
    missing = []
    for spec in _specs([*config.rewards, *judge]):
        try:
            check_modality(load_reward(spec), config.modality)
        except MissingResourceError as error:
            missing.append(str(error))
    return describe(config, method, missing)


# -- parts --------------------------------------------------------------------------------------


def assemble(
    config: Config,
    *,
    policy: Policy | None = None,
    prompts: list[Prompt] | None = None,
    eval_prompts: list[Prompt] | None = None,
    rewards: list[NamedReward] | None = None,
) -> Parts:
    """Build every part of a run that is not given, and check that they fit; write nothing.

    Raises:
        UsageError: something does not fit.
    """
    # A rank may meet no image in a step, and then has no gradient for the vision tower.
    accelerator = make_accelerator(idle=getattr(config.model, "train_vision", False))
    collective = make_collective(accelerator)
    method = make_method(config)
    check_method(method, config, collective.size)
    check_run_folder(config)
    check_trackers(config)
    prompts = load_prompts(config, config.data.train) if prompts is None else prompts
    check_prompts(prompts, config)
    rewards = make_rewards(config) if rewards is None else rewards
    scorer = make_scorer(rewards, config, prompts)
    if config.speed.keep_memory:
        keep_freed_memory()
    given, policy = policy, make_policy(config, method) if policy is None else policy
    policy.network.to(accelerator.device)
    keep_reference(policy, method, config)
    check_reference(policy, method)
    engine = modality_of(config).engine(policy, config, method, "train")
    policy.check(prompts, room=engine.room)
    if given is None and config.model.gradient_checkpointing == "auto":
        checkpoint_where_needed(policy, method, config, accelerator.device, collective)
    greedy = None
    if "baseline_reward" in method.needs:
        greedy = modality_of(config).engine(policy, config, method, "greedy")
    evaluator = make_evaluator(config, policy, method, rewards, eval_prompts)
    if method.rollout.perturbation is not None:
        policy = PerturbedPolicy(policy, method.rollout.perturbation)
        engine = PerturbedEngine(engine, policy, PerturbationPayload)
    return Parts(
        policy=policy,
        method=bind_method(method, config, scorer),
        engine=engine,
        scorer=scorer,
        prompts=PromptSource(prompts, seed=config.seed),
        accelerator=accelerator,
        collective=collective,
        network=accelerator.prepare(EvaluationModule(policy)),
        optimizer=Optimizer(
            trainable_parameters(policy.network),
            betas=config.trainer.betas,
            weight_decay=config.trainer.weight_decay,
        ),
        greedy_engine=greedy,
        evaluator=evaluator,
        ema=None
        if config.trainer.ema_decay is None
        else Ema(policy.network, config.trainer.ema_decay),
        history=make_history(method),
        old=Ema(policy.network, method.rollout.old.decay) if method.rollout.old.averaged else None,
        entropy_control=make_entropy_control(method),
        old_samples=method.rollout.old.averaged and method.rollout.old.samples,
    )


def modality_of(config: Config) -> Modality:
    """What the run's modality says about itself."""
    modality: Modality = resolve("modality", config.modality)
    return modality


def make_method(config: Config) -> Method:
    """The preset that the configuration names, with its overrides."""
    return load_method(config.method.id, **config.method.overrides)


def bind_method(method: Method, config: Config, scorer: Any) -> Method:
    """Tell the method what it cannot know: the rewards' weights and the rollout's length limit."""
    return replace(
        method,
        reward_weights=dict(scorer.weights),
        aggregate=with_default(method.aggregate, length=modality_of(config).length_limit(config)),
    )


def load_prompts(config: Config, path: str) -> list[Prompt]:
    """Read and validate a data file as the modality wants it."""
    return read_prompts(
        path,
        modality=config.modality,
        prompt_column=config.data.prompt_column,
        **modality_of(config).prompt_options(config),
    )


def make_rewards(config: Config) -> list[NamedReward]:
    """The rewards that train."""
    return load_rewards(_specs(config.rewards))


def make_scorer(rewards: list[NamedReward], config: Config, prompts: list[Prompt]) -> RewardRunner:
    """Check loaded rewards against the samples and the data's columns, and put them to work."""
    for reward in rewards:
        check_modality(reward, config.modality)
        check_columns(prompts, reward.required_columns, reward.name)
    return RewardRunner(
        rewards,
        failure=config.reward_failure,
        timeout_s=config.reward_timeout_s,
        save_dir=Path(config.run_dir),
    )


def _specs(rewards: list[Reward]) -> list[dict[str, Any]]:
    return [reward.model_dump() for reward in rewards]


def make_policy(config: Config, method: Method, folder: str | None = None) -> Policy:
    """Load the model that trains, with the reference its method needs and no other."""
    needed = method.reads_reference and method.reference.kind == "run"
    reference = config.model.reference if needed else "none"
    modality = modality_of(config)
    silence(modality.libraries)
    return modality.policy(config, folder or config.model.path, reference)


def checkpoint_where_needed(
    policy: Any, method: Method, config: Config, device: torch.device, collective: Collective
) -> None:
    """Decide what ``gradient_checkpointing: auto`` means, for all ranks alike, and say why."""
    decision = checkpointing(config, method, policy=policy, device=device)
    level = logging.WARNING if decision.on else logging.INFO
    logger.log(level, "activation checkpointing is %s.", decision)
    if any_rank(collective, decision.on):
        policy.checkpoint_activations()


def make_entropy_control(method: Method) -> EntropyControl | None:
    """What holds entropies at targets, where the method has some."""
    options = method.regulariser.entropy_control
    return EntropyControl(**asdict(options)) if options.targets else None


def keep_reference(policy: Policy, method: Method, config: Config) -> None:
    """Exchange the policy's reference where the method decides what it is."""
    options = method.reference
    if options.kind == "bank":
        policy.reference_weights = CheckpointBank(
            policy.network, size=options.size, every=options.every, seed=config.seed
        )


def make_history(method: Method) -> RewardHistory | None:
    """The memory of earlier rewards, if the method reads it."""
    options = method.advantage
    if not options.reads_history:
        return None
    return RewardHistory(size=options.history_size, enough=options.history_min)


def load_policy(config: Config, method: Method, checkpoint: str | Path) -> Policy:
    """The policy with a checkpoint's weights."""
    folder = Path(checkpoint)
    folder = folder / "hf" if (folder / "hf").is_dir() else folder
    if not folder.is_dir():
        raise ModelError(f"no checkpoint at {checkpoint}; expected checkpoints/step_NNNNNN.")
    policy = make_policy(config, method, None if config.model.lora else str(folder))
    if config.model.lora is not None:
        policy.load_export(folder)
    policy.network.to(make_accelerator().device)
    return policy


def make_evaluator(
    config: Config,
    policy: Policy,
    method: Method,
    rewards: list[NamedReward],
    prompts: list[Prompt] | None = None,
) -> Evaluator | None:
    """Held-out evaluation: the run's rewards and the judge, with the evaluation's sampling."""
    if prompts is None:
        if config.data.eval is None:
            return None
        prompts = load_prompts(config, config.data.eval)
    judge = config.eval.judge
    judges = [] if judge is None else load_rewards(_specs([judge]))
    names = {reward.name for reward in rewards}
    judges = [replace(j, name="judge") if j.name in names else j for j in judges]
    scorer = make_scorer([*rewards, *judges], config, prompts)
    engine = modality_of(config).engine(policy, config, method, "eval")
    policy.check(prompts, room=engine.room)
    return Evaluator(
        engine=engine,
        scorer=scorer,
        prompts=PromptSource(prompts, seed=EVAL_SEED, shuffle=False),
        samples=config.eval.samples,
        limit=config.eval.prompts,
        seed=EVAL_SEED,
        judge=list(scorer.weights)[-1 if judge is not None else 0],
        batch=config.rollout.prompts_per_step * config.rollout.group_size,
    )


def make_trackers(config: Config) -> list[Tracker]:
    """metrics.jsonl and the console, then what the configuration names."""
    run_dir = Path(config.run_dir)
    trackers: list[Tracker] = [
        JsonlTracker(run_dir / "metrics.jsonl"),
        Console(config.trainer.steps),
    ]
    settings = config.model_dump()
    external = [resolve("tracker", name) for name in config.tracking.trackers]
    return [*trackers, *(start(run_dir, settings) for start in external)]
