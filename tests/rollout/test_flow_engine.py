"""The flow engine against the diffusers pipelines, the policy's evaluation and its own streams."""

from __future__ import annotations

import pytest
import torch
from fixtures_flow import SIZE, flux_pipeline, sd3_pipeline

from mmgrpo.core.diffusion import linear_shift, transition
from mmgrpo.core.seeding import generator
from mmgrpo.errors import ConfigError, DataError, MmgrpoError
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.flow_families.flux import pack, unpack
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.flow import FlowEngine

pytest.importorskip("diffusers")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 network calls of different batch sizes
PROMPTS = [Prompt(4, "draw 42"), Prompt(9, "red circle")]
STEPS = 5
CASES = [(sd3_pipeline, 1.0), (sd3_pipeline, 4.0), (flux_pipeline, 3.5)]
IDS = ["sd3", "sd3-cfg", "flux"]


def engine_of(make=sd3_pipeline, guidance=1.0, *, policy=None, **options) -> FlowEngine:
    policy = policy or FlowPolicy(make(), max_prompt_tokens=3, guidance_scale=guidance)
    return FlowEngine(policy, **{"num_steps": STEPS, "height": SIZE, "width": SIZE, **options})


def draw(engine: FlowEngine, prompts=PROMPTS, *, group_size=3, seed=1, **options):
    return engine.generate(prompts, group_size=group_size, seed=seed, **options)


def states(rollout) -> torch.Tensor:
    return rollout.trajectories.payload.latents


@pytest.mark.parametrize(("make", "guidance"), CASES, ids=IDS)
def test_without_noise_it_draws_what_the_pipeline_draws(make, guidance):
    engine = engine_of(make, guidance, kernel="ode")
    rollout = draw(engine, group_size=2)
    start, pipe = states(rollout)[:, 0], engine.policy.pipe
    packed = make is flux_pipeline
    options = {
        "prompt": [p.content for p in PROMPTS for _ in range(2)],
        "num_inference_steps": STEPS,
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": guidance,
        "max_sequence_length": 3,
    }
    pipe.set_progress_bar_config(disable=True)
    start = pack(start) if packed else start
    expected = pipe(**options, latents=start, output_type="latent").images
    expected = unpack(expected, 4, 4) if packed else expected
    torch.testing.assert_close(states(rollout)[:, -1], expected, **CLOSE)
    images = pipe(**options, latents=start).images
    for sample, image in zip(rollout.samples, images, strict=True):
        gap = _pixels(sample.image) - _pixels(image)
        assert gap.abs().max() <= 1  # rounding of the last bit
    assert not rollout.trajectories.mask.any()
    assert rollout.cost.decisions == 0


def _pixels(image) -> torch.Tensor:
    return torch.tensor(list(image.convert("RGB").tobytes())).int()


@pytest.mark.parametrize(("make", "guidance"), CASES, ids=IDS)
@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "cps_density"])
def test_evaluation_repeats_the_rollouts_log_prob(make, guidance, kernel):
    selection = {"kind": "random_fraction", "fraction": 0.5}
    engine = engine_of(make, guidance, kernel=kernel, eta=0.6, selection=selection)
    trajectories = draw(engine).trajectories
    rows = torch.randperm(6)
    trajectories = trajectories.select(rows[:5])
    with torch.no_grad():
        found = engine.policy.evaluate(trajectories, Request(prediction=True))
    torch.testing.assert_close(found.log_prob, trajectories.old_log_prob, rtol=0, atol=1e-6)
    assert trajectories.mask.sum(1).tolist() == [2] * 5
    assert len({tuple(row) for row in trajectories.mask.tolist()}) > 1
    assert (trajectories.old_log_prob[trajectories.mask] != 0).all()
    assert (trajectories.old_log_prob[~trajectories.mask] == 0).all()


def test_the_evaluation_sees_a_changed_network():
    """What is sampled has the same log-probability under any network: equality proves little."""
    engine = engine_of()
    trajectories = draw(engine).trajectories
    with torch.no_grad():
        engine.policy.network.proj_out.bias.add_(0.1)
        moved = engine.policy.evaluate(trajectories).log_prob
    assert ((moved - trajectories.old_log_prob)[trajectories.mask].abs() > 1e-4).all()


def test_states_follow_from_the_named_noise():
    engine = engine_of(eta=0.5)
    rollout = draw(engine, seed=7)
    payload = rollout.trajectories.payload
    x, sigmas = payload.latents, payload.sigmas
    every = rollout.trajectories.replace(mask=torch.ones(6, STEPS, dtype=torch.bool))
    with torch.no_grad():
        velocity = engine.policy.evaluate(every, Request(prediction=True)).prediction
    names = [(7, prompt.index, member) for prompt in PROMPTS for member in range(3)]
    for row, name in enumerate(names):
        start = torch.randn(engine.shape, generator=generator(*name))
        torch.testing.assert_close(x[row, 0], start, rtol=0, atol=0)
        for step in range(STEPS):
            kind = "flow_sde" if step < STEPS - 1 else "ode"
            mean, std = transition(
                kind, velocity[row, step][None], x[row, step][None], sigmas[step],
                sigmas[step + 1], eta=0.5, sigma_max=sigmas[1],
            )  # fmt: skip
            noise = torch.randn(engine.shape, generator=generator(*name, step))
            torch.testing.assert_close(x[row, step + 1], (mean + std * noise)[0], **CLOSE)


@pytest.mark.parametrize(("make", "guidance"), CASES, ids=IDS)
def test_a_sample_does_not_depend_on_its_batch(make, guidance):
    options = {"selection": {"kind": "random_fraction", "fraction": 0.5}}
    engine = engine_of(make, guidance, **options)
    whole = draw(engine, [*PROMPTS, Prompt(2, "blue")], group_size=4)
    alone = draw(engine, PROMPTS[1:], group_size=2)
    torch.testing.assert_close(states(whole)[4:6], states(alone), **CLOSE)
    assert torch.equal(whole.trajectories.mask[4:6], alone.trajectories.mask)
    engine.max_rows = 3
    parts = draw(engine, [*PROMPTS, Prompt(2, "blue")], group_size=4)
    torch.testing.assert_close(states(whole), states(parts), **CLOSE)
    assert parts.cost.forwards == 4 * whole.cost.forwards


def test_seeds_prompts_and_members_all_differ_and_repeat():
    engine = engine_of()
    first, again, other = draw(engine), draw(engine), draw(engine, seed=2)
    assert torch.equal(states(first), states(again))
    starts = torch.cat([states(first)[:, 0], states(other)[:, 0]]).flatten(1)
    assert torch.pdist(starts).min() > 1


def test_shared_noise_is_one_start_per_prompt():
    x = states(draw(engine_of(shared_noise=True))).view(2, 3, STEPS + 1, -1)
    assert torch.equal(x[:, :1, 0].expand_as(x[:, :, 0]), x[:, :, 0])
    assert not torch.equal(x[0, 0, 0], x[1, 0, 0])
    assert (x[:, 0, 1] - x[:, 1, 1]).abs().min(dim=-1).values.gt(0).all()


def test_zero_eta_is_the_ode():
    policy = FlowPolicy(sd3_pipeline(), max_prompt_tokens=3)
    plain = draw(engine_of(policy=policy, kernel="ode"))
    for kernel in ("flow_sde", "dance_sde", "cps"):
        still = draw(engine_of(policy=policy, kernel=kernel, eta=0.0))
        assert torch.equal(states(still), states(plain))
        assert not still.trajectories.mask.any()


def test_steps_with_too_little_noise_are_no_decisions():
    rollout = draw(engine_of(eta=1e-8))
    assert not rollout.trajectories.mask.any()
    assert (rollout.trajectories.old_log_prob == 0).all()


def test_noise_enters_only_at_the_selected_steps():
    engine = engine_of(selection={"kind": "window", "start": 1, "width": 2})
    rollout = draw(engine)
    assert rollout.trajectories.mask[0].tolist() == [False, True, True, False, False]
    every = rollout.trajectories.replace(mask=torch.ones(6, STEPS, dtype=torch.bool))
    with torch.no_grad():
        velocity = engine.policy.evaluate(every, Request(prediction=True)).prediction
    x, sigmas = states(rollout), rollout.trajectories.payload.sigmas
    euler = x[:, :-1] + velocity * sigmas.diff().view(1, -1, 1, 1, 1)
    gap = (x[:, 1:] - euler).abs().amax(dim=(0, 2, 3, 4))
    assert (gap[[0, 3, 4]] < 1e-5).all()
    assert (gap[[1, 2]] > 0.1).all()
    engine.selection = {"kind": "single", "step": 3}
    assert draw(engine).trajectories.mask[0].tolist() == [False, False, False, True, False]


def test_what_a_rollout_reports():
    engine = engine_of()
    rollout = draw(engine, version=12)
    trajectories = rollout.trajectories
    assert trajectories.group.tolist() == [4, 4, 4, 9, 9, 9]
    assert trajectories.version.tolist() == [12] * 6
    assert [sample.prompt.index for sample in rollout.samples] == [4, 4, 4, 9, 9, 9]
    assert {sample.image.size for sample in rollout.samples} == {(SIZE, SIZE)}
    assert (rollout.cost.forwards, rollout.cost.decisions) == (STEPS, 6 * (STEPS - 1))
    assert trajectories.payload.prompts.embeddings["text"].shape[0] == 2
    assert not trajectories.mask[:, -1].any()
    assert states(rollout).dtype == torch.float32
    assert draw(engine_of(decode=False)).samples[0].image is None


def test_images_need_not_be_square():
    engine = engine_of(flux_pipeline, 3.5, height=16, width=32, kernel="ode")
    rollout = draw(engine, group_size=1)
    assert rollout.samples[0].image.size == (32, 16)
    assert states(rollout).shape[2:] == (4, 8, 16)


def test_the_schedule_is_the_pipelines_unless_given():
    engine = engine_of(flux_pipeline)
    scheduler, tokens = engine.policy.pipe.scheduler, 16
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)], mu=mu)
    torch.testing.assert_close(engine.sigmas, scheduler.sigmas, rtol=0, atol=1e-6)
    shifted = engine_of(shift=5.0)
    assert torch.equal(shifted.sigmas, linear_shift(STEPS, shift=5.0))
    given = engine_of(schedule=torch.tensor([1.0, 0.5, 0.0]), num_steps=2)
    assert given.num_steps == 2
    assert draw(given).trajectories.payload.rule.sigma_max == 0.5


def test_half_precision_networks_keep_float32_latents_and_repeat():
    policy = FlowPolicy(sd3_pipeline(), dtype="bfloat16", guidance_scale=2.0)
    rollout = draw(engine_of(policy=policy))
    assert states(rollout).dtype == torch.float32
    with torch.no_grad():
        found = policy.evaluate(rollout.trajectories).log_prob
    torch.testing.assert_close(found, rollout.trajectories.old_log_prob, rtol=0, atol=2e-2)
    assert found.dtype == torch.float32


def test_guidance_of_the_engine_overrides_the_policys():
    policy = FlowPolicy(sd3_pipeline(), guidance_scale=4.0)
    guided, plain = (
        draw(engine_of(policy=policy)),
        draw(engine_of(policy=policy, guidance_scale=1.0)),
    )
    assert guided.trajectories.payload.prompts.negative is not None
    assert plain.trajectories.payload.prompts.negative is None
    assert (states(guided)[:, -1] - states(plain)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "flow"}, "Unknown kernel 'flow'; did you mean 'flow_sde'"),
        ({"eta": -1.0}, "eta must be at least 0"),
        ({"height": 15}, r"multiple of 4 pixels.*nearest 16 x 16"),
        ({"height": 64, "width": 64}, "at most 32 pixels"),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"selection": {"kind": "windows"}}, "unknown selection 'windows'"),
        ({"selection": {"kind": "single", "step": 4}}, "must start in"),
        ({"schedule": torch.linspace(1, 0, 4)}, r"num_steps \+ 1 = 6"),
        ({"schedule": torch.linspace(0, 1, 6)}, "must fall"),
        ({"schedule": torch.linspace(1, 0, 6), "shift": 3.0}, "not both"),
        ({"guidance_scale": 0.3}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(**options)


def test_chat_prompts_and_overflowing_networks_are_errors():
    engine = engine_of()
    with pytest.raises(DataError, match="Row 3"):
        draw(engine, [Prompt(3, [{"role": "user", "content": "x"}])])
    with torch.no_grad():
        engine.policy.network.proj_out.bias.fill_(float("inf"))
    with pytest.raises(MmgrpoError, match="6 of 6 images are not finite"):
        draw(engine)
