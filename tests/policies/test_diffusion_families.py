"""Noise-predicting families against the diffusers pipelines, plain forwards and closed forms."""

from __future__ import annotations

import functools
import json
import math
import warnings

import pytest
import torch
from fixtures_diffusion import SD_SCHEDULE, sd15_pipeline, sdxl_pipeline
from fixtures_flow import SIZE, sd3_pipeline
from torch.distributions import Normal

from mmgrpo.core.diffusion import StepRule, Suffix
from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.methods import load_method
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.flow_families.diffusion import DiffusionFamily
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.flow import FlowEngine
from mmgrpo.trainer.loop import check_on_policy

diffusers = pytest.importorskip("diffusers")
warnings.filterwarnings("ignore", module="diffusers")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 network calls of different batch sizes
PROMPTS = [Prompt(4, "draw 42"), Prompt(9, "red circle")]
STEPS = 5
CASES = [
    (sd15_pipeline, 1.0, "epsilon"),
    (sd15_pipeline, 5.0, "epsilon"),
    (sd15_pipeline, 3.0, "v_prediction"),
    (sdxl_pipeline, 1.0, "epsilon"),
    (sdxl_pipeline, 4.0, "epsilon"),
]
IDS = ["sd15", "sd15-cfg", "sd2-v", "sdxl", "sdxl-cfg"]


def ddim(**options):
    return diffusers.DDIMScheduler(
        **{**SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, **options}
    )


def policy_of(make=sd15_pipeline, guidance=1.0, prediction="epsilon", *, scheduler=None, **options):
    scheduler = scheduler or ddim(prediction_type=prediction)
    return FlowPolicy(make(scheduler=scheduler), guidance_scale=guidance, **options)


def engine_of(policy, **options):
    return FlowEngine(policy, **{"num_steps": STEPS, "height": SIZE, "width": SIZE, **options})


def draw(policy, *, group_size=2, seed=1, **options):
    return engine_of(policy, **options).generate(PROMPTS, group_size=group_size, seed=seed)


def pipeline_draws(pipe, start, guidance, *, eta=0.0, **options):
    """What the pipeline itself draws from the same noise."""
    return pipe(
        [p.content for p in PROMPTS for _ in range(2)],
        latents=start.clone(),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        eta=eta,
        **{"height": SIZE, "width": SIZE, **options},
    ).images


@pytest.mark.parametrize(("make", "guidance", "prediction"), CASES, ids=IDS)
def test_without_noise_it_draws_what_the_pipeline_draws_with_ddim(make, guidance, prediction):
    policy = policy_of(make, guidance, prediction)
    for kernel, eta in (("ode", None), ("ddim_eta", 0.0)):
        rollout = draw(policy, kernel=kernel, eta=eta)
        states = rollout.trajectories.payload.latents
        expected = pipeline_draws(policy.pipe, states[:, 0], guidance, output_type="latent")
        torch.testing.assert_close(states[:, -1], expected, rtol=1e-4, atol=1e-5)
        assert not rollout.trajectories.mask.any()
    images = pipeline_draws(policy.pipe, states[:, 0], guidance)
    for sample, image in zip(rollout.samples, images, strict=True):
        gap = [a - b for a, b in zip(sample.image.tobytes(), image.tobytes(), strict=True)]
        assert max(map(abs, gap)) <= 1  # rounding of the last bit


@pytest.mark.parametrize(("make", "guidance", "prediction"), CASES, ids=IDS)
def test_with_its_noise_the_pipeline_draws_the_same(make, guidance, prediction, monkeypatch):
    policy = policy_of(make, guidance, prediction)
    engine = engine_of(policy, kernel="ddim_eta", eta=1.0, selection={"kind": "all"})
    rollout = engine.generate(PROMPTS, group_size=2, seed=1)
    names = [(1, prompt.index, member) for prompt in PROMPTS for member in range(2)]
    noises = [engine._noise([(*n, step) for n in names], torch.device("cpu")) for step in range(5)]
    plain = type(policy.pipe.scheduler).step

    @functools.wraps(plain)  # the pipeline looks at its parameters
    def step_with(self, *arguments, generator=None, **options):
        return plain(self, *arguments, variance_noise=noises.pop(0), **options)

    monkeypatch.setattr(type(policy.pipe.scheduler), "step", step_with)
    states = rollout.trajectories.payload.latents
    expected = pipeline_draws(policy.pipe, states[:, 0], guidance, eta=1.0, output_type="latent")
    torch.testing.assert_close(states[:, -1], expected, rtol=1e-4, atol=1e-5)
    assert rollout.trajectories.mask.all()  # SD ends at alpha bar of timestep 0: noise is left
    assert noises == []


def test_sizes_that_are_not_square_condition_the_xl_model():
    policy = policy_of(sdxl_pipeline, 3.0)
    rollout = draw(policy, kernel="ode", height=16, width=32)
    start, last = (rollout.trajectories.payload.latents[:, level] for level in (0, -1))
    assert start.shape[1:] == (4, 8, 16)
    size = {"height": 16, "width": 32, "output_type": "latent"}
    expected = pipeline_draws(policy.pipe, start, 3.0, **size)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    turned = pipeline_draws(policy.pipe, start, 3.0, **size, original_size=(32, 16))
    assert (turned - expected).abs().max() > 1e-3  # the sizes matter to this network


@pytest.mark.parametrize("make", [sd15_pipeline, sdxl_pipeline])
def test_half_precision_and_checkpointing(make):
    policy = policy_of(make, 2.0, dtype="bfloat16")
    trajectories = draw(policy).trajectories
    assert trajectories.payload.latents.dtype == torch.float32
    with torch.no_grad():
        found = policy.evaluate(trajectories).log_prob
    torch.testing.assert_close(found, trajectories.old_log_prob, rtol=0, atol=2e-2)
    plain, saving = policy_of(make, 2.0), policy_of(make, 2.0, gradient_checkpointing=True)
    trajectories = draw(plain).trajectories
    for one in (plain, saving):
        one.evaluate(trajectories).log_prob.sum().backward()
    gradients = [p.network.conv_in.weight.grad for p in (plain, saving)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert gradients[0].abs().max() > 1e-2


SCHEDULERS = {
    "pndm": lambda: diffusers.PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD_SCHEDULE, timestep_spacing="leading"),
    "ddim to zero": lambda: ddim(set_alpha_to_one=True),
    "trailing": lambda: ddim(timestep_spacing="trailing"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_are_those_of_the_pipelines_ddim(name):
    scheduler = SCHEDULERS[name]()
    policy = policy_of(scheduler=scheduler)
    own = diffusers.DDIMScheduler.from_config(policy.pipe.scheduler.config)
    own.set_timesteps(STEPS)
    sigmas = engine_of(policy).sigmas
    expected = [math.sqrt(1 - own.alphas_cumprod[t].item()) for t in own.timesteps]
    expected.append(math.sqrt(1 - own.final_alpha_cumprod.item()))
    assert sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    assert policy.family.timesteps(sigmas[:-1]).tolist() == own.timesteps.tolist()
    assert sigmas[0] < 1


def test_worked_schedule_of_stable_diffusion():
    """Fifty leading steps with offset 1: 981, 961, ..., 1, then alpha bar of timestep 0."""
    policy = policy_of()
    sigmas = engine_of(policy, num_steps=50).sigmas
    assert policy.family.timesteps(sigmas[:-1]).tolist() == [20 * k + 1 for k in range(49, -1, -1)]
    betas = [(math.sqrt(0.00085) + k / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
             for k in range(982)]  # fmt: skip
    kept = math.prod(1 - beta for beta in betas)
    assert sigmas[0].item() == pytest.approx(math.sqrt(1 - kept), abs=1e-6)
    assert sigmas[-1].item() == pytest.approx(math.sqrt(0.00085), abs=1e-6)
    last = draw(policy, num_steps=50, selection={"kind": "all"}).trajectories.step_std[0, -1]
    assert last.item() == pytest.approx(0.0206, abs=5e-5)


def test_every_timestep_is_found_again_from_its_level():
    family = policy_of().family
    steps = torch.arange(1000)
    assert torch.equal(family.timesteps(family.levels), steps)
    near = family.levels + 0.3 * torch.diff(family.levels, append=torch.ones(1))
    assert torch.equal(family.nearest_level(near), family.levels)


def test_a_schedule_that_ends_at_zero_does_not_train_its_last_step():
    policy = policy_of(scheduler=ddim(set_alpha_to_one=True))
    trajectories = draw(policy, selection={"kind": "all"}).trajectories
    assert trajectories.mask[0].tolist() == [True] * 4 + [False]
    assert trajectories.step_std[0, -1] == 0
    assert trajectories.old_log_prob.isfinite().all()
    flow = draw(FlowPolicy(sd3_pipeline(), max_prompt_tokens=3), selection={"kind": "all"})
    assert torch.equal(flow.trajectories.mask, trajectories.mask)


@pytest.mark.parametrize(("make", "guidance", "prediction"), CASES, ids=IDS)
def test_evaluation_repeats_the_rollout_and_is_the_normal_density(make, guidance, prediction):
    policy = policy_of(make, guidance, prediction)
    trajectories = draw(policy, selection={"kind": "all"}).trajectories.select(torch.tensor([3, 0]))
    with torch.no_grad():
        found = policy.evaluate(trajectories, Request(prediction=True))
    gap = (found.log_prob - trajectories.old_log_prob).abs().max()
    assert gap < 1e-5
    x, levels = trajectories.payload.latents.double(), trajectories.payload.sigmas.double()
    for step in range(STEPS):
        before, after = 1 - levels[step] ** 2, 1 - levels[step + 1] ** 2
        noise = found.prediction[:, step].double()
        x0 = (x[:, step] - (1 - before).sqrt() * noise) / before.sqrt()
        std = ((1 - after) / (1 - before) * (1 - before / after)).sqrt()
        mean = after.sqrt() * x0 + (1 - after - std**2).sqrt() * noise
        expected = Normal(mean, std).log_prob(x[:, step + 1]).flatten(1).mean(1)
        torch.testing.assert_close(found.log_prob[:, step].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [sd15_pipeline, sdxl_pipeline])
def test_the_gradient_of_the_log_prob_by_finite_differences(make):
    policy = policy_of(make, 3.0)
    trajectories = draw(policy).trajectories
    bias = policy.network.conv_out.bias
    policy.evaluate(trajectories).log_prob.sum().backward()
    direction = torch.ones_like(bias)
    values = []
    with torch.no_grad():
        for shift in (1e-2, -2e-2):
            bias += shift * direction
            values.append(policy.evaluate(trajectories).log_prob.double().sum().item())
    slope = (values[0] - values[1]) / 2e-2  # exact: the log-density is quadratic in the bias
    assert (bias.grad * direction).sum().item() == pytest.approx(slope, rel=5e-3)


# -- traps ----------------------------------------------------------------------------------------


def first_deviation(policy, trajectories):
    """Largest ratio - 1 before an update, as the trainer computes it."""
    prepared = load_method("ddpo", advantage={"baseline": "none", "scale": "none"}).prepare(
        trajectories.replace(rewards={"score": torch.arange(len(trajectories)).float()})
    )
    with torch.no_grad():
        found = policy.evaluate(prepared).log_prob
    return (found - prepared.old_log_prob)[prepared.mask].abs().max().expm1().item()


def is_caught(policy, trajectories):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_on_policy(
            {"ratio/first_max_deviation": first_deviation(policy, trajectories)}, "float32"
        )
    return bool(caught)


@pytest.mark.parametrize("make", [sd15_pipeline, sdxl_pipeline])
def test_before_an_update_the_ratio_is_one(make):
    policy = policy_of(make, 5.0)
    trajectories = draw(policy).trajectories
    assert first_deviation(policy, trajectories) < 1e-5
    assert not is_caught(policy, trajectories)


def test_a_truncated_timestep_is_caught(monkeypatch):
    policy = policy_of()
    trajectories = draw(policy).trajectories
    monkeypatch.setattr(DiffusionFamily, "timesteps", lambda self, sigma: (1000 * sigma).long())
    assert is_caught(policy, trajectories)


def test_a_training_pass_without_the_negative_prompt_is_caught():
    policy = policy_of(guidance=5.0)
    trajectories = draw(policy).trajectories
    payload = trajectories.payload
    rest = (payload.prompt_row, payload.latents, payload.sigmas, payload.rule)
    for scale in (1.0, 4.0):
        other = policy.payload(policy.encode(PROMPTS, guidance_scale=scale), *rest)
        assert is_caught(policy, trajectories.replace(payload=other)), scale
    same = policy.payload(policy.encode(PROMPTS, guidance_scale=5.0), *rest)
    assert not is_caught(policy, trajectories.replace(payload=same))


# -- prompts, adapters, export --------------------------------------------------------------------


def test_embeddings_are_the_pipelines():
    policy = policy_of(sdxl_pipeline, 4.0)
    found = policy.encode(PROMPTS)
    expected = policy.pipe.encode_prompt([p.content for p in PROMPTS])
    torch.testing.assert_close(found.embeddings["text"], expected[0])
    torch.testing.assert_close(found.embeddings["pooled"], expected[2])
    assert torch.equal(found.negative["text"], expected[1][:1])
    assert (found.negative["pooled"] == 0).all()
    worded = policy_of(sdxl_pipeline, 4.0, negative_prompt="blue").encode(PROMPTS).negative
    expected = policy.pipe.encode_prompt("draw 42", negative_prompt="blue")
    torch.testing.assert_close(worded["text"], expected[1])
    torch.testing.assert_close(worded["pooled"], expected[3])


def nudge(policy):
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("make", [sd15_pipeline, sdxl_pipeline])
def test_exported_adapters_load_in_peft_in_diffusers_and_here(make, tmp_path):
    from peft import PeftModel

    options = {"rank": 2, "alpha": 8.0}  # a scale of 4, which a loader must not lose
    policy = policy_of(make, lora=options)
    trained = [name for name, p in policy.network.named_parameters() if p.requires_grad]
    layers = {name.split(".lora_")[0].rpartition("attn")[2] for name in trained}
    assert layers == {f"{n}.{k}" for n in (1, 2) for k in ("to_q", "to_k", "to_v", "to_out.0")}
    trajectories = draw(policy).trajectories
    nudge(policy)
    with torch.no_grad():
        expected = policy.evaluate(trajectories).log_prob
        with policy.reference():
            start = policy.evaluate(trajectories).log_prob
        torch.testing.assert_close(start, trajectories.old_log_prob, **CLOSE)
        assert (start - expected).abs().max() > 1e-3
        policy.export(tmp_path)
        through_peft, through_diffusers = policy_of(make), policy_of(make)
        through_peft.network = PeftModel.from_pretrained(through_peft.network, tmp_path)
        through_diffusers.pipe.load_lora_weights(tmp_path)
        again = policy_of(make, lora=options)
        again.load_export(tmp_path)
        for loaded in (through_peft, through_diffusers, again):
            found = loaded.evaluate(trajectories).log_prob
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [sd15_pipeline, sdxl_pipeline])
def test_exported_pipelines_load_in_diffusers_and_here(make, tmp_path):
    policy = policy_of(make)
    trajectories = draw(policy).trajectories
    nudge(policy)
    policy.export(tmp_path / "hf")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "hf")
    assert type(loaded) is type(policy.pipe)
    again = policy_of(lambda **options: make(seed=5, **options))
    again.load_export(tmp_path / "hf")
    with torch.no_grad():
        expected = policy.evaluate(trajectories).log_prob
        for fresh in (FlowPolicy(loaded), FlowPolicy(tmp_path / "hf"), again):
            assert torch.equal(fresh.evaluate(trajectories).log_prob, expected)


# -- the forward process --------------------------------------------------------------------------


def test_noised_samples_and_their_targets():
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    family, flow = policy_of().family, FlowPolicy(sd3_pipeline()).family
    own, sigma = family._ddim, family.levels[[7, 800]]
    expected = own.add_noise(clean, noise, torch.tensor([7, 800]))
    torch.testing.assert_close(family.noised(clean, noise, sigma), expected, rtol=0, atol=1e-5)
    assert torch.equal(family.target(clean, noise, sigma), noise)
    half = torch.full((2,), 0.25)
    torch.testing.assert_close(flow.noised(clean, noise, half), 0.75 * clean + 0.25 * noise)
    assert torch.equal(flow.target(clean, noise, half), noise - clean)
    assert torch.equal(flow.nearest_level(half), half)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "unsupported scheduler prediction type 'sample'"),
        ({"thresholding": True}, "scheduler option thresholding is not supported"),
        ({"timestep_spacing": "leadin"}, "timestep_spacing 'leadin'; did you mean 'leading'"),
    ],
)
def test_schedulers_that_cannot_be_followed(change, message):
    with pytest.raises(ModelError, match=message):
        policy_of(scheduler=ddim(**change))


def test_pipelines_that_do_not_fit():
    with pytest.raises(ModelError, match="unsupported scheduler prediction type 'epsilon' of Flow"):
        policy_of(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipe = sd15_pipeline()
    pipe.text_encoder = None
    with pytest.raises(ModelError, match=r"has no text_encoder; expected unet, vae, scheduler"):
        FlowPolicy(pipe)
    with pytest.raises(ModelError, match="takes the guidance scale as an input"):
        policy_of(lambda scheduler: sd15_pipeline(scheduler=scheduler, time_cond_proj_dim=8))
    with pytest.raises(ConfigError, match=r"max_prompt_tokens is the length of a T5.*got 4"):
        policy_of(max_prompt_tokens=4)


def test_an_incomplete_folder_is_named(tmp_path):
    sd15_pipeline().save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for file in (tmp_path / "model/unet").iterdir():
        file.unlink()
    (tmp_path / "model/unet").rmdir()
    with pytest.raises(ModelError, match="is incomplete: it has no unet"):
        FlowPolicy(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "flow_sde"}, "kernel 'flow_sde' does not fit a diffusion model; valid: auto"),
        ({"shift": 3.0}, "shift is for flow models"),
        ({"suffix": Suffix(fraction=0.5)}, "A suffix solves the ODE of a flow model, and this"),
        ({"num_steps": 2000}, "has no 2000 steps"),
        ({"schedule": torch.linspace(0.9, 0, STEPS + 1)}, "must fall from at most 1 to 0.029"),
    ],
)
def test_options_that_do_not_fit_a_diffusion_model(options, message):
    with pytest.raises((ConfigError, ModelError), match=message):
        engine_of(policy_of(), **options)


def test_a_flow_model_refuses_the_diffusion_kernels():
    flow = FlowPolicy(sd3_pipeline(), max_prompt_tokens=3)
    with pytest.raises(
        ConfigError, match="kernel 'ddim_eta' does not fit a flow model; valid: auto"
    ):
        engine_of(flow, kernel="ddim_eta")
    auto = draw(flow, kernel="auto").trajectories
    assert auto.payload.rule == StepRule("flow_sde", 0.7, auto.payload.sigmas[1].item())
    auto = draw(policy_of(), kernel="auto").trajectories
    assert auto.payload.rule == StepRule("ddim_eta", 1.0, auto.payload.sigmas[1].item())


def test_a_zero_terminal_signal_is_refused():
    policy = policy_of(scheduler=ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    with pytest.raises(ModelError, match=r"must fall from below 1; got .1\.0"):
        engine_of(policy)
