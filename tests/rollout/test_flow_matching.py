"""Draws on clean samples: what is noised, what goes through the network, and what comes back."""

from __future__ import annotations

import pytest
import torch
from fixtures_diffusion import sd15_pipeline
from fixtures_flow import SIZE
from flow_drawing import CLOSE, PROMPTS, STEPS, draw

from mmgrpo.core.diffusion import MatchingRule
from mmgrpo.core.seeding import generator
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MethodError
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.matching import STREAM

DRAWS = MatchingRule(draws=3, times="stratified", shift=3.0)
SHARED = MatchingRule(draws=3, shared=True)


def draw_matching(policy, rule=DRAWS, **options):
    return draw(policy, kernel="ode", matching=rule, **options).trajectories


def noise_of(trajectories):
    """``[B, K, ...]`` the noise that a flow's target is made of."""
    return trajectories.target + trajectories.payload.clean[:, None]


@pytest.mark.parametrize("kernel", ["ode", "flow_sde"])
def test_the_clean_samples_are_those_of_the_same_rollout_without_draws(policy, kernel):
    plain = draw(policy, kernel=kernel).trajectories
    found = draw(policy, kernel=kernel, matching=DRAWS).trajectories
    assert torch.equal(found.payload.clean, plain.payload.latents[:, -1])
    assert torch.equal(found.group, plain.group)
    assert found.mask.shape == (8, 3)
    assert found.mask.all()
    assert found.old_log_prob is None
    assert found.target.shape == (8, 3, *found.payload.shape)
    assert {x.dtype for x in (found.target, found.sigma)} == {torch.float32}


def test_every_sample_has_its_own_noise_unless_the_group_shares(policy):
    own, shared = noise_of(draw_matching(policy)), noise_of(draw_matching(policy, SHARED))
    assert len(torch.unique(own.flatten(2).flatten(0, 1), dim=0)) == 24
    for group in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(shared[group], shared[group][:1].expand_as(shared[group]))
    assert not torch.allclose(shared[0], shared[4])
    sigma = draw_matching(policy, SHARED).sigma
    assert len(torch.unique(sigma, dim=0)) == 2
    assert len(torch.unique(draw_matching(policy).sigma, dim=0)) == 8


def test_noise_is_standard_normal_and_no_stream_of_the_rollout(policy):
    rule = MatchingRule(draws=40)
    found = noise_of(draw_matching(policy, rule, group_size=8))
    assert found.mean().item() == pytest.approx(0, abs=0.01)
    assert found.std().item() == pytest.approx(1, abs=0.01)
    starts = draw(policy, kernel="ode", group_size=8).trajectories.payload.latents[:, 0]
    similar = torch.einsum("bkchw,bchw->bk", found, starts) / starts[0].numel()
    assert similar.abs().max() < 0.35


def test_draws_depend_on_seed_prompt_and_sample_only(policy):
    both = draw_matching(policy)
    alone = draw_matching(policy, prompts=PROMPTS[1:], group_size=2)
    torch.testing.assert_close(noise_of(both)[4:6], noise_of(alone), **CLOSE)
    assert torch.equal(both.sigma[4:6], alone.sigma)
    other = draw_matching(policy, seed=2)
    assert not torch.equal(other.sigma, both.sigma)


def test_the_log_probability_is_the_weighted_error_at_the_noised_sample(policy):
    rule = MatchingRule(draws=2, weight="sigma")
    found = draw_matching(policy, rule)
    with torch.no_grad():
        evaluation = policy.evaluate(found, Request(prediction=True))
        for row, step in ((0, 0), (3, 1), (7, 0)):
            sigma = found.sigma[row, step]
            noise = noise_of(found)[row, step]
            state = (1 - sigma) * found.payload.clean[row] + sigma * noise
            prompts = policy.encode([PROMPTS[row // 4]])
            velocity = policy.velocity(state[None], sigma[None], prompts, torch.tensor([0]))[0]
            error = (velocity - (noise - found.payload.clean[row])).square().mean()
            wanted = -sigma * error
            torch.testing.assert_close(evaluation.log_prob[row, step], wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(evaluation.prediction[row, step], velocity, **CLOSE)


def test_masked_draws_are_not_evaluated(policy):
    found = draw_matching(policy)
    mask = torch.zeros_like(found.mask)
    mask[2, 1] = mask[5, 0] = True
    policy.forwards, policy.max_decisions = 0, 1
    with torch.no_grad():
        part = policy.evaluate(found.replace(mask=mask))
        policy.max_decisions = None
        whole = policy.evaluate(found)
    torch.testing.assert_close(part.log_prob[mask], whole.log_prob[mask], **CLOSE)
    assert (part.log_prob[~mask] == 0).all()
    assert policy.forwards == 3


def test_selecting_joining_and_moving_keep_every_row(policy):
    one = draw_matching(policy)
    other = draw_matching(policy, prompts=[Prompt(2, "blue square")], group_size=3)
    joined = Trajectories.cat([one, other]).to(torch.device("cpu"))
    rows = torch.tensor([9, 0, 6])
    part = joined.select(rows)
    assert len(part.payload.prompts) == 3
    with torch.no_grad():
        wanted = torch.cat([policy.evaluate(t).log_prob for t in (one, other)])
        torch.testing.assert_close(policy.evaluate(joined).log_prob, wanted, **CLOSE)
        torch.testing.assert_close(policy.evaluate(part).log_prob, wanted[rows], **CLOSE)


def test_samples_whose_errors_count_differently_are_not_joined(policy):
    with pytest.raises(ValueError, match="different matching rules"):
        Trajectories.cat([draw_matching(policy), draw_matching(policy, SHARED)])


def test_the_velocity_divergence_has_its_closed_form_and_a_gradient(policy):
    found = draw_matching(policy)
    bias = policy.network.proj_out.bias
    with torch.no_grad():
        old = policy.evaluate(found, Request(prediction=True)).prediction
    assert not old.requires_grad
    found = found.replace(old_prediction=old)
    request = Request(divergence="velocity", divergence_target="old")
    with torch.no_grad():
        bias.add_(0.02)
    moved = policy.evaluate(found, request)
    (gradient,) = torch.autograd.grad(moved.divergence.sum(), bias)
    with torch.no_grad():
        bias.sub_(0.02)
    torch.testing.assert_close(
        moved.divergence, torch.full_like(moved.divergence, 0.02**2), rtol=1e-3, atol=1e-7
    )
    assert (gradient > 0).all()


@pytest.mark.parametrize(
    "request_", [Request(entropy=True), Request(divergence="exact"), Request(divergence="code")]
)
def test_what_only_a_denoising_step_has_is_refused(policy, request_):
    with pytest.raises(MethodError, match="draw on a clean sample"):
        policy.evaluate(draw_matching(policy), request_)


def test_the_size_of_the_latents_is_that_of_the_images(policy):
    assert draw_matching(policy).payload.shape == policy.family.latent_shape(SIZE, SIZE)


def test_a_unet_is_noised_at_the_levels_of_its_timesteps():
    """Brute force over the scheduler's thousand levels; the network sees the very timestep."""
    pipe = sd15_pipeline()
    unet, rule, seen = FlowPolicy(pipe), MatchingRule(draws=4, shift=3.0), []
    found = draw(unet, kernel="ode", matching=rule).trajectories
    levels = (1 - pipe.scheduler.alphas_cumprod).sqrt()
    gap = (found.sigma[..., None] - levels).abs()
    assert gap.amin(dim=-1).max() < 1e-6
    schedule = unet.family.schedule(STEPS, height=SIZE, width=SIZE)
    for row in range(8):
        name = (STREAM, 1, PROMPTS[row // 4].index, row % 4)
        asked = rule.sigmas(schedule, generator(*name))
        nearest = (asked[:, None] - levels).abs().argmin(dim=1)
        torch.testing.assert_close(found.sigma[row], levels[nearest], rtol=0, atol=1e-6)
    unet.network.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        unet.evaluate(found)
    assert torch.equal(torch.cat(seen), gap.argmin(dim=-1).flatten())
