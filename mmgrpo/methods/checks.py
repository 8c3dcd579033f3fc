"""Choices that make no sense together, found when a method is composed.

Each check yields what is wrong as a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mmgrpo.core.diffusion import AUTO, KERNELS, select_steps
from mmgrpo.core.objectives import PAIRS_DECISIONS, READS_MATCHING, Decisions, Matching
from mmgrpo.core.ratios import READS_DIVERGENCE
from mmgrpo.errors import MethodError, nearest
from mmgrpo.methods.components import accepts, spec_of
from mmgrpo.methods.options import COMBINE
from mmgrpo.registry import names

if TYPE_CHECKING:
    from mmgrpo.methods.method import Method

DENOISING = {"image", "video"}
"""Modalities whose decisions are Gaussian denoising steps."""
REQUIREMENTS = ("on_policy", "one_epoch")
"""What a preset may require of the trainer beside what its components need."""


def contradictions(method: Method) -> Iterator[str]:
    """Everything that is wrong with a method."""
    for requirement in method.requires:
        if requirement not in REQUIREMENTS:
            yield f"unknown requirement '{requirement}'{nearest(requirement, REQUIREMENTS)}"
    yield from _rollout(method)
    yield from _perturbation(method)
    yield from _objective(method)
    yield from _matching(method)
    yield from _reward(method)
    yield from _history(method)
    yield from _regulariser(method)
    yield from _divergence(method)


def _rollout(method: Method) -> Iterator[str]:
    kernel = method.rollout.kernel
    if kernel not in (AUTO, *KERNELS):
        yield f"unknown rollout.kernel '{kernel}'{nearest(kernel, (AUTO, *KERNELS))}"
    referenced = any(need.startswith("ref_") for need in method.needs)
    if method.rollout.drawn_by == "reference" and not referenced:
        yield "rollout.drawn_by is 'reference', and nothing in the method compares with one."
    decides_elsewhere = method.rollout.matching.on or method.rollout.perturbation is not None
    still = kernel in KERNELS and KERNELS[kernel].still == kernel
    if still and not decides_elsewhere:
        yield f"rollout.kernel '{kernel}' draws no noise, so there would be no decision to train."
    try:
        select_steps(method.rollout.selection, 1000, seed=0, sample_seeds=[0])
    except ValueError as error:
        yield f"rollout.selection: {_sentence(error)}"


def check_rollout(method: Method, *, num_steps: int, group_size: int) -> None:
    """Refuse a schedule or a group that the rollout's steps and tree do not fit.

    Raises:
        MethodError: a window or a split outside the schedule, or a group that is no whole number
            of trees.
    """
    rollout = method.rollout
    try:
        chosen = select_steps(rollout.selection, num_steps, seed=0, sample_seeds=[0])
        rollout.tree.owners(group_size, chosen.stochastic)
        rollout.matching.count(num_steps)
    except ValueError as error:
        raise MethodError(
            f"method {method.id} does not fit rollout.num_steps {num_steps} and "
            f"rollout.group_size {group_size}: {_sentence(error)}"
        ) from error


def _perturbation(method: Method) -> Iterator[str]:
    if method.rollout.perturbation is not None and "on_policy" not in method.requires:
        yield (
            "rollout.perturbation linearises the log-probability at the weights that sampled: "
            "requires must contain on_policy."
        )


def _objective(method: Method) -> Iterator[str]:
    """A dry call finds bounds that contradict each other."""
    try:
        method.objective(_one_decision())
    except ValueError as error:
        yield f"{method.component('objective')}: {_sentence(error)}"
    if method.components.get("trust_region") and not accepts(method.objective, "trust_region"):
        yield (
            f"trust_region has no effect with objective '{method.component('objective')}'; "
            "set it to null."
        )
    pairs, reads_pairs = method.component("pairs"), "pairs" in method.needs
    if reads_pairs and pairs == "none":
        yield (
            f"objective '{method.component('objective')}' compares pairs, and none are chosen; "
            f"set pairs to one of {', '.join(name for name in names('pairs') if name != 'none')}."
        )
    if pairs != "none" and not reads_pairs:
        yield f"pairs has no effect with objective '{method.component('objective')}'."


def _matching(method: Method) -> Iterator[str]:
    """Draws on clean samples have an error and a velocity, and no Gaussian of a step."""
    objective, options = method.component("objective"), method.regulariser
    if not method.rollout.matching.on:
        if objective in READS_MATCHING:
            yield f"objective '{objective}' reads draws on clean samples; set rollout.matching."
        return
    if objective in PAIRS_DECISIONS and not method.rollout.matching.shared:
        yield (
            f"objective '{objective}' compares two samples draw by draw, and they do not have the "
            "same draws: set rollout.matching.shared."
        )
    if not set(method.modalities) <= DENOISING:
        yield "rollout.matching is for denoisers: modalities must be of [image, video]."
    if options.kl.coefficient and options.kl.gaussian and options.kl.estimator != "velocity":
        yield (
            f"regulariser.kl.estimator '{options.kl.estimator}' measures a denoising step; with "
            "rollout.matching it is 'velocity'."
        )
    if options.entropy or method.reads_divergence:
        yield "entropy and the exact divergence belong to denoising steps, not to rollout.matching."


def _one_decision() -> Decisions:
    """A decision of zeros, with everything that an objective may read."""
    zero, field = torch.zeros(1, 1), torch.zeros(1, 1, 1)
    return Decisions(
        zero,
        zero,
        zero,
        zero,
        zero,
        ref_log_prob=zero,
        matching=Matching(field, field, field, zero),
        mask=torch.ones(1, 1, dtype=torch.bool),
        group=torch.zeros(1, dtype=torch.int64),
        pairs=torch.zeros(1, 2, dtype=torch.int64),
    )


def _reward(method: Method) -> Iterator[str]:
    options, credit = method.reward, method.component("credit")
    if options.kl and options.kl_placement == "decision" and credit != "reward_to_go":
        yield (
            f"reward.kl_placement 'decision' needs credit 'reward_to_go'; '{credit}' drops "
            "the rewards of single decisions."
        )
    whole = options.kl and options.kl_placement == "sample"
    combine = spec_of(options.combine, COMBINE, where="reward.combine")["name"]
    if whole and combine != COMBINE:
        yield (
            "reward.kl with kl_placement 'sample' is subtracted from the sum of the rewards, but "
            f"combine '{combine}' normalises each by itself."
        )
    if method.advantage.whiten and method.advantage.valid_group_factor:
        yield "advantage.whiten undoes the scale that advantage.valid_group_factor sets."


def _history(method: Method) -> Iterator[str]:
    options, reward = method.advantage, method.reward
    if not options.reads_history:
        return
    combine = spec_of(reward.combine, COMBINE, where="reward.combine")["name"]
    if method.shaping or reward.kl or combine != COMBINE:
        yield (
            "the history remembers the weighted sum of the rewards as it is: reward.shaping, "
            f"reward.kl and a combine other than '{COMBINE}' do not go with it."
        )
    if options.history_min > options.history_size:
        yield (
            f"advantage.history_min is {options.history_min}, and only the last "
            f"{options.history_size} rewards of a prompt are remembered."
        )


def _regulariser(method: Method) -> Iterator[str]:
    options = method.regulariser.kl
    if options.target == "best" and not options.gaussian:
        yield (
            f"regulariser.kl.target 'best' compares predictions; estimator '{options.estimator}' "
            "reads log-probabilities."
        )
    if options.floor is not None and 0 < options.coefficient < options.floor:
        yield (
            f"regulariser.kl.floor is {options.floor}, above the coefficient "
            f"{options.coefficient} that it grows to."
        )
    if method.regulariser.ref_velocity and not set(method.modalities) <= DENOISING:
        yield "regulariser.ref_velocity is for denoisers: modalities must be of [image, video]."
    if options.gradient and options.gaussian:
        yield (
            f"regulariser.kl.gradient '{options.gradient}' has no effect with the divergence "
            f"'{options.estimator}'."
        )


def _divergence(method: Method) -> Iterator[str]:
    options = method.regulariser.kl
    if not method.reads_divergence:
        return
    ours = options.estimator == "exact" and options.target == "old"
    if options.coefficient and options.gaussian and not ours:
        yield (
            "ratio or trust region read the exact divergence from the old policy, and an "
            f"evaluation has one divergence: regulariser.kl cannot be '{options.estimator}' to "
            f"{options.target} beside it."
        )
    if method.component("ratio") in READS_DIVERGENCE and not set(method.modalities) <= DENOISING:
        yield "ratio 'guard' is for denoising steps: modalities must be of [image, video]."


def _sentence(error: ValueError) -> str:
    return str(error).rstrip(".") + "."
