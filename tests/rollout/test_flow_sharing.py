"""Windows, suffixes and guarded ratios in the flow engine, against limits and plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from fixtures_flow import SIZE
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

from mmgrpo.core.diffusion import Suffix, dpmpp_2m, linear_shift, transition
from mmgrpo.core.seeding import generator
from mmgrpo.methods import load_method

# -- windows --------------------------------------------------------------------------------------


def test_a_window_over_all_steps_is_flow_grpo(policy):
    wanted = draw_method(policy, "flow-grpo").trajectories
    whole = {"kind": "moving_window", "width": STEPS - 1, "last": STEPS - 1}
    for name, changes in [
        ("mix-grpo", {"selection": whole, "shared_noise": False}),
        ("flow-grpo-fast", {"selection": {"kind": "window", "width": STEPS - 1}}),
        ("mix-grpo-flash", {"selection": whole, "shared_noise": False}),
    ]:
        found = draw_method(policy, name, overrides=changes, iteration=3).trajectories
        if name != "mix-grpo-flash":
            assert_same(found, wanted)
        else:  # one ODE step is left, from known x0: DPM-Solver++ has the order 1 there too
            torch.testing.assert_close(found.payload.latents, wanted.payload.latents, **CLOSE)
            assert torch.equal(found.old_log_prob, wanted.old_log_prob)


def test_the_window_moves_with_the_iteration_and_is_shared_by_the_ranks(policy):
    starts = []
    for iteration in range(8):
        ranks = [
            draw_method(
                policy, "mix-grpo", overrides={"selection": {"width": 2, "interval": 2}},
                iteration=iteration, prompts=[prompt],
            ).trajectories
            for prompt in PROMPTS
        ]  # fmt: skip
        masks = torch.cat([rank.mask for rank in ranks])
        assert (masks == masks[0]).all()
        starts.append(masks[0].nonzero().flatten().tolist())
    assert starts == [places for places in ([0, 1], [1, 2], [2, 3], [3]) for _ in range(2)]


def test_the_random_window_is_shared_by_the_ranks_and_changes_with_the_seed(policy):
    def masks(prompt, seed):
        found = draw_method(policy, "flow-grpo-fast", prompts=[prompt], seed=seed, group_size=2)
        return found.trajectories.mask

    for seed in range(4):
        assert torch.equal(masks(PROMPTS[0], seed), masks(PROMPTS[1], seed))
    places = {tuple(masks(PROMPTS[0], seed)[0].tolist()) for seed in range(8)}
    assert len(places) > 1
    assert all(sum(place) == 2 and not place[-1] for place in places)


@pytest.mark.parametrize("shared", [False, True])
def test_the_steps_before_a_window_are_computed_once_per_start(policy, monkeypatch, shared):
    selection = {"kind": "window", "start": 2, "width": 2}
    plain = draw(policy, selection=selection).trajectories
    seen = count_states(policy, monkeypatch)
    rollout = draw(policy, selection=selection, shared_noise=shared)
    alike = 2 if shared else 8  # two prompts
    assert seen == [alike] * 3 + [8] * 3
    assert rollout.cost.forwards == STEPS
    found = rollout.trajectories
    assert found.node is None
    if not shared:
        assert_same(found, plain)
    seen.clear()
    log_prob = policy.evaluate(found).log_prob
    assert seen == [alike + 8]
    torch.testing.assert_close(log_prob, found.old_log_prob, rtol=0, atol=1e-6)
    seen.clear()
    policy.evaluate(found.select(torch.tensor([5, 0, 1])))
    assert seen == [(2 if shared else 3) + 3]


# -- suffix ---------------------------------------------------------------------------------------


def test_flash_is_dpm_solver_after_the_window(policy):
    """Against a plain loop for one sample."""
    count, fraction = 10, 0.5
    schedule = linear_shift(count, shift=3.0)
    rollout = draw(
        policy, num_steps=count, shift=3.0, group_size=2,
        selection={"kind": "window", "start": 1, "width": 2},
        suffix=Suffix("dpmpp_2m", fraction),
    )  # fmt: skip
    found = rollout.trajectories
    points = 3 * (u := torch.linspace(1 - 3 / count, 0, int(fraction * 8))) / (1 + 2 * u)
    assert rollout.cost.forwards == 3 + len(points) - 1
    encoded = policy.encode(PROMPTS)
    for row, name in enumerate([(1, p.index, g) for p in PROMPTS for g in range(2)]):
        x, before = torch.randn(4, SIZE // 2, SIZE // 2, generator=generator(*name))[None], None
        sigmas = torch.cat([schedule[:3], points])
        for index, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            with torch.no_grad():
                v = policy.velocity(x, sigma[None], encoded, torch.tensor([row // 2]))
            x0 = x - sigma * v
            if index in (1, 2):
                noise = torch.randn(x.shape[1:], generator=generator(*name, index))
                mean, std = transition(
                    "flow_sde", v, x, sigma, after, eta=0.7, sigma_max=schedule[1]
                )
                x = mean + std * noise
            elif index == 0:
                x = x + v * (after - sigma)
            else:
                x = dpmpp_2m(x0, x, sigma, after, previous=before)
            before = (x0, sigma)
        torch.testing.assert_close(found.payload.latents[row, -1], x[0], **CLOSE)
    with torch.no_grad():
        again = policy.evaluate(found).log_prob
    torch.testing.assert_close(again, found.old_log_prob, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("start", "calls"), [(0, 11), (5, 14), (10, 17)])
def test_flash_makes_the_published_number_of_calls(policy, start, calls):
    rollout = draw_method(
        policy, "mix-grpo-flash", num_steps=25, iteration=start * 20, group_size=2,
        prompts=PROMPTS[:1],
    )  # fmt: skip
    assert rollout.trajectories.mask[0].nonzero().flatten().tolist() == list(
        range(start, start + 4)
    )
    assert rollout.cost.forwards == calls


def test_flash_star_makes_seven_calls(policy):
    star = {"selection": {"interval": 1000000}, "suffix": {"fraction": 0.2}}
    rollout = draw_method(
        policy, "mix-grpo-flash", overrides=star, num_steps=25, iteration=299, group_size=2
    )
    assert rollout.cost.forwards == 7


def test_euler_on_all_points_is_the_ode(policy):
    selection = {"kind": "window", "start": 1, "width": 2}
    wanted = draw(policy, selection=selection).trajectories
    found = draw(policy, selection=selection, suffix=Suffix("euler", 0.999999)).trajectories
    assert not Suffix("euler", 0.999999).plain
    assert found.payload.latents.shape == wanted.payload.latents.shape
    whole = Suffix("euler", 1.0).sigmas(linear_shift(STEPS), 3)
    assert torch.equal(whole, linear_shift(STEPS)[3:])


# -- guard and mask -------------------------------------------------------------------------------


def test_the_guarded_ratio_is_the_noise_times_the_shift_of_the_mean(policy):
    """log r~ = mean z (mu - mu_old), from the engine's own noise streams."""
    method = load_method("grpo-guard")
    rollout = draw_method(policy, "grpo-guard", group_size=2)
    trajectories, found, now = moved_evaluation(policy, rollout.trajectories, method)
    guarded = method.ratio(
        found.log_prob - trajectories.old_log_prob,
        trajectories.mask,
        divergence=found.divergence,
        step_std=trajectories.step_std,
    )
    payload, sigmas = trajectories.payload, trajectories.payload.sigmas
    names = [(1, prompt.index, member) for prompt in PROMPTS for member in range(2)]
    for row, step in trajectories.mask.nonzero().tolist():
        (mean, std), (before, _) = (
            transition(
                "flow_sde", v[row, step][None], payload.latents[row, step][None], sigmas[step],
                sigmas[step + 1], eta=0.7, sigma_max=sigmas[1],
            )
            for v in (now, trajectories.old_prediction)
        )  # fmt: skip
        noise = torch.randn(mean.shape[1:], generator=generator(*names[row], step))
        wanted = (noise * (mean - before)[0]).mean()
        assert trajectories.step_std[row, step].item() == pytest.approx(std.item(), rel=1e-6)
        assert guarded[row, step].item() == pytest.approx(wanted.item(), abs=2e-6)
    assert guarded.abs().max() > 1e-5


@pytest.mark.parametrize("name", ["grpo-guard", "flow-dppo"])
def test_the_methods_train_on_what_the_policy_answers(policy, name):
    method = load_method(name)
    rollout = draw_method(policy, name)
    rewards = {"score": torch.linspace(0, 1, 8)}
    prepared = method.prepare(rollout.trajectories.replace(rewards=rewards))
    trajectories, found, _ = moved_evaluation(policy, prepared, method)
    on_policy = policy.evaluate(trajectories, method.request)
    start = method.loss(on_policy.log_prob, trajectories, evaluation=on_policy)
    assert start.max_log_ratio < 1e-5
    assert start.metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    start.loss.backward()
    assert policy.network.proj_out.bias.grad.norm() > 0
    policy.network.zero_grad()
    after = method.loss(found.log_prob, trajectories, evaluation=found)
    assert 0 < after.metrics["clip_fraction"] < 1
