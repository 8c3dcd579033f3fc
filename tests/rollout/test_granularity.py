"""G2RPO: one noise continued on several grids, judged in each, evaluated once."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from flow_drawing import (
    CLOSE,
    PROMPTS,
    STEPS,
    assert_same,
    count_states,
    draw,
    draw_method,
    moved_evaluation,
)

from mmgrpo.core.diffusion import Suffix, Tree, fan_out, linear_shift, transition
from mmgrpo.core.seeding import generator
from mmgrpo.methods import load_method

TWO = Suffix(strides=(1, 2))


def at(step):
    return {"kind": "window", "start": step, "width": 1}


def places(schedule, levels):
    """Which entries of the schedule the levels are."""
    return [schedule.tolist().index(level) for level in levels.tolist()]


@pytest.mark.parametrize(
    ("stride", "indices"),
    [(1, [2, 3, 4, 5, 6, 7, 8]), (2, [2, 3, 5, 7]), (3, [2, 3, 6])],
)
def test_the_published_indices(stride, indices):
    """8 steps, noise at step 1; where the last is not clean its prediction is decoded instead."""
    schedule = linear_shift(8)
    found = Suffix(strides=(stride,)).grids(schedule, 2)[0]
    assert places(schedule, found) == [*indices[:-1], 8]


def test_a_step_to_zero_is_the_clean_prediction():
    x, v, sigma = torch.randn(3, 4), torch.randn(3, 4), torch.tensor(0.4)
    found = TWO.step(v, x, sigma, torch.tensor(0.0), None)
    torch.testing.assert_close(found, x - 0.4 * v)


def test_fanned_out_samples_share_what_lies_before():
    owner = Tree().owners(2, torch.tensor([False, True, False, False]), shared_start=True)
    assert owner.tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert fan_out(owner, 2, 2).tolist() == [
        [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 2, 2], [0, 0, 1, 3, 3],
    ]  # fmt: skip


def test_the_first_granularity_is_the_plain_branching(policy):
    wanted = draw(policy, selection=at(1), shared_noise=True).trajectories
    found = draw(policy, selection=at(1), shared_noise=True, suffix=TWO).trajectories
    assert found.stratum.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    first = found.select(found.stratum == 0)
    torch.testing.assert_close(first.old_log_prob, wanted.old_log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        first.payload.latents[:, [0, 1, 2, -1]], wanted.payload.latents[:, [0, 1, 2, -1]], **CLOSE
    )


def test_an_anchor_with_one_branch_is_the_linear_rollout(policy):
    options = {"selection": at(2), "group_size": 1}
    wanted = draw(policy, **options).trajectories
    anchor = Tree(splits="stochastic", width=None)
    assert_same(draw(policy, tree=anchor, **options).trajectories, wanted)
    assert_same(draw(policy, suffix=Suffix(strides=(1,)), **options).trajectories, wanted)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_coarse_grid_by_a_plain_loop(policy, step):
    """Two members of one prompt: ODE to the anchor, one noise, every second step."""
    found = draw(
        policy, prompts=PROMPTS[:1], group_size=2, selection=at(step), shared_noise=True,
        shift=3.0, num_steps=8, suffix=TWO,
    ).trajectories  # fmt: skip
    schedule, encoded = linear_shift(8, shift=3.0), policy.encode(PROMPTS[:1])
    index = [*range(step + 2), *range(step + 2, 9, 2)]
    sigmas = torch.cat([schedule[index[:-1]], torch.zeros(1)])
    for member in range(2):
        x = torch.randn(4, 8, 8, generator=generator(1, PROMPTS[0].index))[None]
        for number, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            with torch.no_grad():
                v = policy.velocity(x, sigma[None], encoded, torch.zeros(1).long())
            if number == step:
                name = (1, PROMPTS[0].index, member, step)
                mean, std = transition(
                    "flow_sde", v, x, sigma, after, eta=0.7, sigma_max=schedule[1]
                )
                x = mean + std * torch.randn(4, 8, 8, generator=generator(*name))
            else:
                x = x + v * (after - sigma)
        torch.testing.assert_close(found.payload.latents[2 + member, -1], x[0], **CLOSE)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_what_it_costs(policy, monkeypatch, step):
    """The trunk once, each suffix for every member; one state, one decision per member to train."""
    seen = count_states(policy, monkeypatch)
    rollout = draw(policy, selection=at(step), shared_noise=True, suffix=TWO)
    fine, coarse = STEPS - step - 1, len(range(step + 2, STEPS + 1, 2))
    assert seen == [2] * (step + 1) + [8] * (fine + coarse)
    assert rollout.cost.forwards == len(seen)
    assert rollout.cost.decisions == 8
    assert len(rollout.samples) == 16
    assert [s.prompt.index for s in rollout.samples] == rollout.trajectories.group.tolist()
    seen.clear()
    log_prob = policy.evaluate(rollout.trajectories).log_prob
    assert seen == [2]
    torch.testing.assert_close(log_prob, rollout.trajectories.old_log_prob, rtol=0, atol=1e-6)


def prepared(policy, rewards):
    method = load_method("g2rpo")
    found = draw_method(policy, "g2rpo", prompts=PROMPTS[:1], group_size=4).trajectories
    return method, method.prepare(found.replace(rewards=rewards))


def z_scores(values):
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / (std + 1e-8) for value in values]


def test_advantages_are_summed_over_granularities_and_rewards(policy):
    a, b = [0.1, 0.4, 0.2, 0.9, 5.0, 1.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.5, 3.0]
    rewards = {"a": torch.tensor(a).double(), "b": torch.tensor(b).double()}
    _, found = prepared(policy, rewards)
    terms = [z_scores(values[part]) for values in (a, b) for part in (slice(4), slice(4, 8))]
    wanted = [sum(column) for column in zip(*terms, strict=True)]
    (step,) = found.mask[0].nonzero().flatten().tolist()
    torch.testing.assert_close(found.advantage[:, step], torch.tensor([*wanted, *wanted]).double())
    assert found.weight.sum().item() == pytest.approx(4)
    assert (found.node[:4, step] == found.node[4:, step]).all()


def test_a_sum_beyond_five_is_clamped(policy):
    method = load_method("g2rpo", credit={"clip": 1.5})
    reward = torch.tensor([0.0, 0.0, 0.0, 1.0] * 2)
    found = draw_method(policy, "g2rpo", prompts=PROMPTS[:1]).trajectories
    top = method.prepare(found.replace(rewards={"r": reward})).advantage.sum(dim=1)
    assert top.tolist() == pytest.approx([-1.0, -1.0, -1.0, 1.5] * 2)


def test_the_step_lies_in_the_noisier_half(policy):
    steps = set()
    for seed in range(12):
        found = draw_method(policy, "g2rpo", seed=seed, group_size=2, prompts=PROMPTS[:1])
        steps.add(*found.trajectories.mask[0].nonzero().flatten().tolist())
    assert steps == {0, 1, 2}  # of 6


def test_log_ratios_differ_by_their_noise_only(policy):
    """log r_i + mean Dmu^2 / (2 s^2) = mean z_i Dmu / s: one forward serves every member."""
    method = load_method("g2rpo", ratio="guard")
    rollout = draw_method(policy, "g2rpo", prompts=PROMPTS[:1], group_size=3)
    trajectories, found, now = moved_evaluation(policy, rollout.trajectories, method)
    (step,) = trajectories.mask[0].nonzero().flatten().tolist()
    payload, sigmas = trajectories.payload, trajectories.payload.sigmas
    (mean, std), (before, _) = (
        transition(
            "flow_sde", v[:1, step], payload.latents[:1, step], sigmas[step], sigmas[step + 1],
            eta=0.7, sigma_max=sigmas[1],
        )
        for v in (now, trajectories.old_prediction)
    )  # fmt: skip
    shift = (mean - before)[0]
    log_ratio = found.log_prob - trajectories.old_log_prob
    for row in range(6):
        noise = torch.randn(shift.shape, generator=generator(1, PROMPTS[0].index, row % 3, step))
        linear = log_ratio[row, step] + (shift**2).mean() / (2 * std**2)
        assert linear.item() == pytest.approx((noise * shift).mean().item() / std.item(), abs=2e-6)
    assert len(log_ratio[:3, step].unique()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": ()}, "strides must be different"),
        ({"strides": (1, 1)}, "strides must be different"),
        ({"strides": (0,)}, "strides must be different"),
        ({"strides": (1, 2), "fraction": 0.5}, "set one of them"),
    ],
)
def test_wrong_strides_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Suffix(**options)
