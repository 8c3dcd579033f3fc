"""The Wan family against the diffusers pipeline itself and plain calls of its parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures_flow import SIZE, sd3_pipeline
from fixtures_video import HEIGHT, LATENT, NUM_FRAMES, WIDTH, wan_pipeline

from mmgrpo.core.diffusion import StepRule, linear_shift
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.flow_families import wan
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.flow import FlowEngine

pytest.importorskip("diffusers")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 network calls of different batch sizes
PROMPTS = [Prompt(4, "draw 42"), Prompt(9, "red circle")]
TOKENS = 5
AVOID = "blue square"


def policy_of(pipe=None, **options) -> FlowPolicy:
    return FlowPolicy(pipe or wan_pipeline(), **{"max_prompt_tokens": TOKENS, **options})


def engine_of(policy: FlowPolicy, **options) -> FlowEngine:
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "num_steps": 4}
    return FlowEngine(policy, **{**size, **options})


def ask(pipe, prompt: str, **options):
    """What the pipeline itself draws."""
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "num_inference_steps": 4}
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, max_sequence_length=TOKENS, **size, **options).frames


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_ode_ends_where_the_pipeline_ends(guidance):
    policy = policy_of(guidance_scale=guidance, negative_prompt=AVOID)
    rollout = engine_of(policy, kernel="ode").generate(PROMPTS, group_size=2, seed=3)
    latents = rollout.trajectories.payload.latents
    assert latents.shape == (4, 5, *LATENT)
    options = {"guidance_scale": guidance, "negative_prompt": AVOID}
    for row, sample in enumerate(rollout.samples):
        text, start = sample.prompt.content, latents[row, :1]
        end = ask(policy.pipe, text, latents=start, output_type="latent", **options)
        torch.testing.assert_close(latents[row, -1:], end, **CLOSE)
        frames = ask(policy.pipe, text, latents=start, output_type="pil", **options)[0]
        assert len(sample.video) == NUM_FRAMES
        assert sample.image is None
        for mine, theirs in zip(sample.video, frames, strict=True):
            assert mine.size == (WIDTH, HEIGHT)
            assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= 1


def test_guidance_leads_away_from_the_negative_prompt_in_one_call():
    policy = policy_of(guidance_scale=5.0, negative_prompt=AVOID)
    x, sigma = torch.randn(2, *LATENT), torch.tensor([0.9, 0.4])
    found = policy.velocity(x, sigma, policy.encode(PROMPTS), torch.tensor([1, 0]))
    assert policy.forwards == 1
    pipe = policy.pipe
    for row, text in enumerate(("red circle", "draw 42")):
        yes, no = pipe.encode_prompt(text, AVOID, max_sequence_length=TOKENS)
        one = [pipe.transformer(x[row, None], 1000 * sigma[row, None], t).sample for t in (yes, no)]
        torch.testing.assert_close(found[row], (one[1] + 5 * (one[0] - one[1]))[0], **CLOSE)
    assert policy_of(guidance_scale=1.0).encode(PROMPTS).negative is None
    with pytest.raises(ConfigError, match=r"at least 1 \(1: none\); got 0\.5"):
        policy_of(guidance_scale=0.5)


def test_a_prompt_is_as_long_as_in_a_plain_call_unless_told():
    assert policy_of(max_prompt_tokens=None).encode(PROMPTS).embeddings["text"].shape == (
        2, wan.DEFAULT_TOKENS, 16,
    )  # fmt: skip
    short = policy_of().encode(PROMPTS).embeddings["text"]
    assert short.shape == (2, TOKENS, 16)
    assert (short[:, -1] == 0).all()  # two words, a space and the end leave one


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_schedule_is_that_of_either_scheduler(shift, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=shift), unipc):
        family = policy_of(wan_pipeline(scheduler=scheduler)).family
        scheduler.set_timesteps(steps)
        found = family.schedule(steps, height=HEIGHT, width=WIDTH)
        torch.testing.assert_close(found, scheduler.sigmas, rtol=0, atol=1.1e-6)


def test_a_first_order_multistep_scheduler_walks_the_same_ode():
    """UniPC of order 1 without its corrector is Euler, so the whole pipeline must agree."""
    from diffusers import UniPCMultistepScheduler

    class Exact(UniPCMultistepScheduler):
        """Its own timesteps are cut to whole numbers, as those of a run never are."""

        def set_timesteps(self, *args, **options):
            super().set_timesteps(*args, **options)
            self.timesteps = 1000 * self.sigmas[:-1]

    scheduler = Exact(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1,
        disable_corrector=[0, 1, 2, 3],
    )  # fmt: skip
    policy = policy_of(wan_pipeline())
    sigmas = policy.family.schedule(4, height=HEIGHT, width=WIDTH)
    policy.pipe.scheduler = scheduler
    scheduler.set_timesteps(4)
    engine = engine_of(policy, kernel="ode", schedule=scheduler.sigmas)
    assert not torch.allclose(engine.sigmas, sigmas, atol=1e-3)  # another grid than Euler's
    rollout = engine.generate(PROMPTS[:1], group_size=1, seed=3)
    latents = rollout.trajectories.payload.latents
    end = ask(policy.pipe, "draw 42", latents=latents[:, 0], guidance_scale=1.0,
              output_type="latent")  # fmt: skip
    torch.testing.assert_close(latents[:, -1], end, rtol=0, atol=1e-4)


def test_multistep_schedules_that_are_no_flows_are_refused():
    from diffusers import UniPCMultistepScheduler

    for options, words in (
        ({"use_flow_sigmas": False}, "use_flow_sigmas is off"),
        ({"use_flow_sigmas": True, "use_dynamic_shifting": True}, "use_dynamic_shifting is not"),
    ):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", **options)
        with pytest.raises(ModelError, match=words):
            engine_of(policy_of(wan_pipeline(scheduler=scheduler)))
    with pytest.raises(ModelError, match=r"UniPCMultistepScheduler \(prediction type epsilon\)"):
        policy_of(wan_pipeline(scheduler=UniPCMultistepScheduler(use_flow_sigmas=True)))


def test_the_first_ratio_is_one_and_the_gradient_reaches_every_block():
    policy = policy_of(guidance_scale=3.0)
    engine = engine_of(policy, kernel="flow_sde", eta=0.7)
    trajectories = engine.generate(PROMPTS, group_size=3, seed=0).trajectories
    assert trajectories.mask.sum() == 6 * 3
    found = policy.evaluate(trajectories).log_prob
    torch.testing.assert_close(found, trajectories.old_log_prob, rtol=0, atol=1e-4)
    found.sum().backward()
    silent = [n for n, p in policy.network.named_parameters() if not p.grad.abs().sum() > 0]
    # A bias of the keys shifts every score of a query alike, which the softmax undoes.
    assert all(name.endswith("to_k.bias") for name in silent)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_frames_in_pixels_and_in_latents(frames):
    policy = policy_of()
    channels, latent_frames, rows, columns = policy.family.latent_shape(HEIGHT, WIDTH, frames)
    assert (channels, rows, columns) == (LATENT[0], LATENT[2], LATENT[3])
    pixels = torch.zeros(1, 3, frames, HEIGHT, WIDTH)
    assert policy.pipe.vae.encode(pixels).latent_dist.mean.shape[2] == latent_frames
    decoded = policy.family.decode(torch.zeros(2, channels, latent_frames, rows, columns))
    assert [len(video) for video in decoded] == [frames, frames]


def test_clips_are_decoded_in_parts_of_bounded_size(monkeypatch):
    family = policy_of().family
    latents, sizes, decode = torch.randn(5, *LATENT), [], family.pipe.vae.decode
    whole = family.decode(latents)
    monkeypatch.setattr(wan, "DECODED_PIXELS", 2 * NUM_FRAMES * HEIGHT * WIDTH)
    monkeypatch.setattr(
        family.pipe.vae, "decode", lambda z, **kw: sizes.append(len(z)) or decode(z, **kw)
    )
    parts = family.decode(latents)
    assert sizes == [2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        assert [frame.tobytes() for frame in one] == [frame.tobytes() for frame in other]


def test_sizes_that_do_not_fit_are_refused_in_one_sentence():
    policy = policy_of()
    assert policy.family.latent_shape(480, 832) == (4, 21, 120, 208)  # 81 frames
    with pytest.raises(ConfigError, match=r"multiple of 4 plus 1.*got 16, nearest 17\."):
        engine_of(policy, num_frames=16)
    with pytest.raises(ConfigError, match=r"video size must be a multiple of 8 pixels.*20 x 32"):
        engine_of(policy, height=20)


def test_pipelines_of_other_versions_are_refused():
    two = wan_pipeline()
    two.register_modules(transformer_2=two.transformer)
    with pytest.raises(ModelError, match=r"Wan 2\.2"):
        policy_of(two)
    one = wan_pipeline()
    one.register_to_config(expand_timesteps=True)
    with pytest.raises(ModelError, match=r"expected Wan 2\.1"):
        policy_of(one)


# -- adapters and folders --------------------------------------------------------------------------


def trajectories_of(policy: FlowPolicy) -> Trajectories:
    """States that no rollout made: any will do for an evaluation."""
    torch.manual_seed(2)
    sigmas = linear_shift(4, shift=2.0)
    payload = policy.payload(
        policy.encode(PROMPTS), torch.tensor([0, 1]), torch.randn(2, 5, *LATENT), sigmas,
        StepRule("flow_sde", 0.7, sigmas[1].item()),
    )  # fmt: skip
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    return Trajectories(group=torch.tensor([4, 9]), mask=mask, payload=payload)


def nudged(policy: FlowPolicy) -> FlowPolicy:
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def test_an_adapter_is_on_every_attention_and_starts_silent():
    plain, adapted = policy_of(), policy_of(lora={"rank": 2, "alpha": 4.0})
    trajectories = trajectories_of(plain)
    start = plain.evaluate(trajectories).log_prob
    torch.testing.assert_close(adapted.evaluate(trajectories).log_prob, start, **CLOSE)
    trained = {n for n, p in adapted.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4 * 2  # blocks, attentions, projections, A and B
    nudged(adapted)
    assert (adapted.evaluate(trajectories).log_prob - start).abs().max() > 1e-3
    with adapted.reference(), torch.no_grad():
        torch.testing.assert_close(adapted.evaluate(trajectories).log_prob, start, **CLOSE)


def test_exported_adapters_load_in_peft_in_diffusers_and_here(tmp_path):
    from peft import PeftModel

    options = {"rank": 2, "alpha": 8.0}  # a scale of 4, which a loader must not lose
    policy = nudged(policy_of(lora=options))
    trajectories = trajectories_of(policy)
    expected = policy.evaluate(trajectories).log_prob.detach()
    policy.export(tmp_path)
    through_peft, through_diffusers = policy_of(), policy_of()
    with torch.no_grad():
        before = through_peft.evaluate(trajectories).log_prob
        assert (before - expected).abs().max() > 1e-2
        through_peft.network = PeftModel.from_pretrained(through_peft.network, tmp_path)
        through_diffusers.pipe.load_lora_weights(tmp_path)
        for loaded in (through_peft, through_diffusers):
            found = loaded.evaluate(trajectories).log_prob
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        again = policy_of(lora=options)
        again.load_export(tmp_path)
        assert torch.equal(again.evaluate(trajectories).log_prob, expected)


def test_exported_pipelines_load_in_diffusers_and_here(tmp_path):
    from diffusers import DiffusionPipeline

    policy = nudged(policy_of())
    trajectories = trajectories_of(policy)
    expected = policy.evaluate(trajectories, Request(prediction=True))
    policy.export(tmp_path / "hf")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "hf")
    assert type(loaded) is type(policy.pipe)
    again = policy_of(wan_pipeline(seed=5))
    again.load_export(tmp_path / "hf")
    with torch.no_grad():
        for fresh in (policy_of(loaded), policy_of(tmp_path / "hf"), again):
            found = fresh.evaluate(trajectories, Request(prediction=True))
            assert torch.equal(found.prediction, expected.prediction)
    (tmp_path / "hf" / "text_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="is incomplete: it has no text_encoder"):
        policy_of(tmp_path / "hf")


def test_half_precision_keeps_the_parts_that_the_model_keeps(tmp_path):
    wan_pipeline().save_pretrained(tmp_path)
    policy = policy_of(tmp_path, dtype="bfloat16", lora={"rank": 2, "alpha": 2.0})
    dtypes = {name: p.dtype for name, p in policy.network.named_parameters()}
    kept = ("lora_", "time_embedder", "scale_shift_table", "norm2")
    for name, dtype in dtypes.items():
        whole = any(part in name for part in kept)
        assert dtype == (torch.float32 if whole else torch.bfloat16), name
    found = policy.evaluate(trajectories_of(policy), Request(prediction=True))
    assert {found.log_prob.dtype, found.prediction.dtype} == {torch.float32}
    exact = policy_of().evaluate(trajectories_of(policy), Request(prediction=True))
    torch.testing.assert_close(found.prediction, exact.prediction, rtol=0.1, atol=0.1)


def test_image_pipelines_draw_images_and_take_no_frames():
    policy = FlowPolicy(sd3_pipeline(), max_prompt_tokens=3)
    assert policy.modality == "image"
    assert policy_of().modality == "video"
    size = {"height": SIZE, "width": SIZE, "num_steps": 2}
    sample = FlowEngine(policy, **size).generate(PROMPTS[:1], group_size=1, seed=0).samples[0]
    assert sample.video is None
    assert sample.image.size == (SIZE, SIZE)
