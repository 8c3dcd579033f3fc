"""Before the update: rewards become advantages, once per rollout, over whole groups."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.core.advantages import valid_group_factor, whiten
from mmgrpo.core.collective import Collective
from mmgrpo.core.credit import node_mean, node_weight
from mmgrpo.core.divergence import k1
from mmgrpo.core.filters import BEFORE_STATISTICS
from mmgrpo.core.groups import best_row, zero_nan
from mmgrpo.core.multi_reward import weighted_sum
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods.components import with_default
from mmgrpo.methods.pairing import pair_up

if TYPE_CHECKING:
    from mmgrpo.methods.method import Method


def named_rewards(trajectories: Trajectories) -> dict[str, Tensor]:
    """The named rewards, or ``reward`` as the only one; ``[B]`` floats, NaN: does not apply.

    Raises:
        ValueError: there is none, or one is infinite.
    """
    rewards = trajectories.rewards
    if not rewards and trajectories.reward is not None:
        rewards = {"reward": trajectories.reward}
    if not rewards:
        raise ValueError("trajectories carry neither rewards nor reward")
    for name, reward in rewards.items():
        if reward.isinf().any():
            row = int(reward.isinf().nonzero()[0])
            raise ValueError(f"reward '{name}' of sample {row} is infinite: {float(reward[row])}")
    return {
        name: reward if reward.is_floating_point() else reward.float()
        for name, reward in rewards.items()
    }


def prepare(method: Method, trajectories: Trajectories, collective: Collective) -> Trajectories:
    """Fill ``reward``, ``advantage`` and ``weight``, and take out of ``mask`` what is not trained.

    Rows are kept, so that row b is still sample b: what the filters drop, and samples to which no
    reward applies, have an empty mask and advantage 0.

    Args:
        method: the method.
        trajectories: a whole update: every group complete.
        collective: statistics over ranks.
    """
    rewards = named_rewards(trajectories)
    score = weighted_sum(rewards, method.reward_weights)
    counted = _keep(method, trajectories, score, before=True).squeeze(1)
    exact = {
        name: torch.where(counted, reward, torch.full_like(reward, torch.nan)).double()
        for name, reward in rewards.items()
    }
    advantage = method.combine(
        exact,
        method.reward_weights,
        partial(_sample_advantage, method, trajectories, collective),
        collective=collective,
    )
    trajectories = trajectories.replace(
        reward=_shape(method, trajectories, score.double()).to(score.dtype),
        mask=trajectories.mask & ~advantage.isnan()[:, None],
    )
    advantage = _spread(method, trajectories, zero_nan(advantage), collective).to(score.dtype)
    trajectories = trajectories.replace(advantage=advantage)
    if method.regulariser.kl.target == "best":
        trajectories = _follow_best(trajectories, score)
    mask = trajectories.mask & _keep(method, trajectories, score, before=False)
    trajectories = trajectories.replace(mask=mask, advantage=advantage * mask)
    if "pairs" in method.needs:
        trajectories = pair_up(method, trajectories, rewards)
    if trajectories.node is None or trajectories.weight is not None:
        return trajectories
    return trajectories.replace(weight=node_weight(trajectories, advantage.dtype))


def _follow_best(trajectories: Trajectories, score: Tensor) -> Trajectories:
    """Give every decision the prediction at the same step of its group's best sample.

    A decision that the best sample does not have keeps its own.
    """
    old = trajectories.old_prediction
    if old is None:
        return trajectories
    best = best_row(score, trajectories.group)
    there = trajectories.mask[best].reshape(*trajectories.mask.shape, *(1,) * (old.dim() - 2))
    return trajectories.replace(best_prediction=torch.where(there, old[best], old))


def _keep(method: Method, trajectories: Trajectories, score: Tensor, *, before: bool) -> Tensor:
    """``[B, 1]`` or ``[B, T]`` bool: what the filters of one stage keep."""
    kept = torch.ones_like(trajectories.group, dtype=torch.bool)[:, None]
    for name, keep in method.filters:
        if before == (name in BEFORE_STATISTICS):
            kept = kept & keep(trajectories, score).reshape(len(trajectories), -1)
    return kept


def _shape(method: Method, trajectories: Trajectories, reward: Tensor) -> Tensor:
    """``[B]``: the shaped reward, less the whole sample's KL penalty where it is placed there."""
    for shaping in method.shaping:
        reward = shaping(reward, trajectories)
    options = method.reward
    if options.kl and options.kl_placement == "sample":
        reward = reward - options.kl * _reward_kl(method, trajectories).sum(dim=1)
    return reward


def _reward_kl(method: Method, trajectories: Trajectories) -> Tensor:
    old, ref = trajectories.old_log_prob, trajectories.ref_log_prob
    if old is None or ref is None:
        raise ValueError(f"method {method.id} needs old_log_prob and ref_log_prob")
    estimate = k1(old, ref)
    return torch.where(trajectories.mask, estimate, torch.zeros_like(estimate))


def _sample_advantage(
    method: Method, trajectories: Trajectories, collective: Collective, reward: Tensor
) -> Tensor:
    """``[B]``: (reward - baseline) / scale; NaN where the reward does not apply."""
    options = method.advantage
    reward = _shape(method, trajectories, reward)
    baseline = with_default(method.baseline, collective=collective)
    centred = reward - baseline(reward, trajectories)
    scale = with_default(method.scale, ddof=options.ddof, eps=options.eps, collective=collective)
    advantage = centred / scale(reward, centred, trajectories)
    if options.valid_group_factor is not None:
        advantage = advantage * valid_group_factor(
            reward, trajectories, cap=options.valid_group_factor, collective=collective
        )
    if options.clip is not None:
        advantage = advantage.clamp(-options.clip, options.clip)
    return advantage


def _spread(
    method: Method, trajectories: Trajectories, advantage: Tensor, collective: Collective
) -> Tensor:
    """``[B, T]``: the sample advantage over the decisions; shared decisions get the mean."""
    whitening = partial(whiten, unbiased=method.advantage.unbiased, collective=collective)
    if method.advantage.whiten == "samples":
        advantage = whitening(advantage, trajectories.mask.any(dim=1))
    spread: Tensor = method.credit(advantage, _penalise_decisions(method, trajectories))
    if trajectories.node is not None:
        spread = node_mean(spread, trajectories)
    if method.advantage.whiten == "decisions":
        spread = whitening(spread, node_weight(trajectories))
    return spread


def _penalise_decisions(method: Method, trajectories: Trajectories) -> Trajectories:
    """Add each decision's KL penalty to its step reward, where the method places it there."""
    options = method.reward
    if not options.kl or options.kl_placement != "decision":
        return trajectories
    penalty = -options.kl * _reward_kl(method, trajectories)
    earned = trajectories.step_reward
    return trajectories.replace(step_reward=penalty if earned is None else earned + penalty)
