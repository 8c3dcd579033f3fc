"""The flow policy against plain forwards, the diffusers pipeline and closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fixtures_flow import SIZE, flux_pipeline, sd3_pipeline
from torch.distributions import Normal, kl_divergence

from mmgrpo.core.diffusion import StepRule, linear_shift
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError, DataError, MethodError, ModelError
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.flow_families.packing import pack, unpack
from mmgrpo.policies.latent_payload import LatentPayload, LatentPrompts
from mmgrpo.policies.prompt_cache import PromptCache
from mmgrpo.protocols import Prompt, Request

pytest.importorskip("diffusers")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 network calls of different batch sizes
PROMPTS = [Prompt(4, "draw 42"), Prompt(9, "red circle")]
SIGMAS = linear_shift(4, shift=2.0)
MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
PROMPT_ROW = torch.tensor([0, 0, 1, 1])


def policy_of(make=sd3_pipeline, **options) -> FlowPolicy:
    return FlowPolicy(make(), **{"max_prompt_tokens": 3, **options})


def trajectories_of(policy: FlowPolicy, *, kernel="flow_sde", eta=0.7, **fields) -> Trajectories:
    """States that no rollout made: any will do for an evaluation."""
    channels, rows, columns = policy.family.latent_shape(SIZE, SIZE)
    payload = policy.payload(
        policy.encode(PROMPTS),
        PROMPT_ROW,
        torch.randn(4, 5, channels, rows, columns),
        SIGMAS,
        StepRule(kernel, eta, SIGMAS[1].item()),
    )
    group = torch.tensor([4, 4, 9, 9])
    return Trajectories(group=group, mask=MASK, payload=payload, **fields)


def plain_velocity(policy: FlowPolicy, x: torch.Tensor, sigma: float, text: str) -> torch.Tensor:
    """One state through the transformer, written out after the pipelines' denoising loops."""
    pipe, x = policy.pipe, x[None]
    if hasattr(pipe, "text_encoder_3"):
        embeddings, negative, pooled, negative_pooled = pipe.encode_prompt(
            text, text, text, max_sequence_length=3, negative_prompt=""
        )

        def call(states, vector):
            return pipe.transformer(x, states, vector, torch.tensor([1000 * sigma])).sample[0]

        conditional = call(embeddings, pooled)
        if policy.guidance_scale == 1:
            return conditional
        unconditional = call(negative, negative_pooled)
        return unconditional + policy.guidance_scale * (conditional - unconditional)
    embeddings, pooled, text_ids = pipe.encode_prompt(text, text, max_sequence_length=3)
    _, channels, rows, columns = x.shape
    out = pipe.transformer(
        pipe._pack_latents(x, 1, channels, rows, columns),
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
        timestep=torch.tensor([sigma]),
        guidance=torch.tensor([policy.guidance_scale]),
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(1, rows // 2, columns // 2, "cpu", torch.float32),
    ).sample
    scale = pipe.vae_scale_factor
    return pipe._unpack_latents(out, rows * scale, columns * scale, scale)[0]


CASES = [(sd3_pipeline, 1.0), (sd3_pipeline, 4.0), (flux_pipeline, 3.5)]
IDS = ["sd3", "sd3-cfg", "flux"]


@pytest.mark.parametrize(("make", "guidance"), CASES, ids=IDS)
def test_log_prob_is_that_of_each_decision_alone(make, guidance):
    policy = policy_of(make, guidance_scale=guidance)
    trajectories = trajectories_of(policy)
    found = policy.evaluate(trajectories, Request(prediction=True, entropy=True))
    latents = trajectories.payload.latents
    for row, step in MASK.nonzero().tolist():
        text = PROMPTS[PROMPT_ROW[row]].content
        sigma, dt = SIGMAS[step].item(), (SIGMAS[step + 1] - SIGMAS[step]).item()
        x, x_next = latents[row, step], latents[row, step + 1]
        velocity = plain_velocity(policy, x, sigma, text)
        torch.testing.assert_close(found.prediction[row, step], velocity, **CLOSE)
        g = 0.7 * math.sqrt(sigma / (1 - (SIGMAS[1].item() if sigma == 1 else sigma)))
        mean = x * (1 + g * g * dt / (2 * sigma))
        mean = mean + velocity * (1 + g * g * (1 - sigma) / (2 * sigma)) * dt
        normal = Normal(mean, g * math.sqrt(-dt))
        expected = normal.log_prob(x_next).mean()
        torch.testing.assert_close(found.log_prob[row, step], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.entropy[row, step], normal.entropy().mean(), **CLOSE)
    assert (found.log_prob[~MASK] == 0).all()
    assert (found.prediction[~MASK] == 0).all()
    assert found.divergence is None
    assert found.log_prob.dtype == torch.float32


@pytest.mark.parametrize(("make", "guidance"), CASES, ids=IDS)
def test_one_network_call_whatever_the_mask(make, guidance):
    policy = policy_of(make, guidance_scale=guidance)
    trajectories = trajectories_of(policy)
    policy.evaluate(trajectories)
    assert policy.forwards == 1


def test_chunks_change_nothing_but_the_number_of_calls():
    policy = policy_of()
    trajectories = trajectories_of(policy)
    whole = policy.evaluate(trajectories).log_prob
    policy.max_decisions = 2
    policy.forwards = 0
    torch.testing.assert_close(policy.evaluate(trajectories).log_prob, whole, **CLOSE)
    assert policy.forwards == 3  # six decisions


def test_nothing_to_evaluate():
    policy = policy_of()
    trajectories = trajectories_of(policy).replace(mask=torch.zeros_like(MASK))
    assert (policy.evaluate(trajectories).log_prob == 0).all()
    assert policy.forwards == 0


def test_gradient_of_the_log_prob_by_finite_differences():
    policy = policy_of(guidance_scale=3.0)
    trajectories = trajectories_of(policy)
    bias = policy.network.proj_out.bias
    policy.evaluate(trajectories).log_prob.sum().backward()
    direction = torch.randn_like(bias)
    values = []
    with torch.no_grad():
        for shift in (1e-2, -2e-2):
            bias += shift * direction
            values.append(policy.evaluate(trajectories).log_prob.double().sum().item())
    slope = (values[0] - values[1]) / 2e-2  # exact: the log-density is quadratic in the bias
    assert (bias.grad * direction).sum().item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("target", ["ref", "old"])
def test_divergence_is_measured_from_the_stored_velocity_and_has_a_gradient(target):
    policy = policy_of()
    trajectories = trajectories_of(policy)
    own = policy.evaluate(trajectories, Request(prediction=True)).prediction.detach()
    other = own + 0.1 * torch.randn_like(own)
    trajectories = trajectories.replace(**{f"{target}_prediction": other})
    request = Request(divergence="exact", divergence_target=target)
    found = policy.evaluate(trajectories, request).divergence
    for row, step in MASK.nonzero().tolist():
        rule, sigma = trajectories.payload.rule, SIGMAS[step : step + 2]
        normals = []
        for velocity in (own, other):
            x = trajectories.payload.latents[row, step][None]
            out = rule.step(velocity[row, step][None], x, *sigma, x_next=x)
            normals.append(Normal(out.mean, out.std))
        expected = kl_divergence(*normals).mean()
        torch.testing.assert_close(found[row, step], expected, rtol=1e-3, atol=1e-9)
    assert (found[~MASK] == 0).all()
    found.sum().backward()
    assert policy.network.proj_out.bias.grad.abs().sum() > 0
    same = trajectories.replace(**{f"{target}_prediction": own})
    assert policy.evaluate(same, request).divergence.max() < 1e-10


def test_a_divergence_from_nothing_is_an_error():
    policy = policy_of()
    with pytest.raises(MethodError, match="from the ref prediction"):
        policy.evaluate(trajectories_of(policy), Request(divergence="exact"))


def test_guidance_of_the_rollout_is_used_whatever_the_policy_says_now():
    policy = policy_of(guidance_scale=4.0)
    trajectories = trajectories_of(policy)
    before = policy.evaluate(trajectories).log_prob
    policy.guidance_scale = 1.0
    assert torch.equal(policy.evaluate(trajectories).log_prob, before)
    unguided = policy.encode(PROMPTS)
    assert unguided.negative is None
    payload = trajectories.payload
    other = policy.payload(unguided, PROMPT_ROW, payload.latents, payload.sigmas, payload.rule)
    moved = policy.evaluate(trajectories.replace(payload=other)).log_prob
    assert (moved - before).abs().max() > 1e-4


def test_packing_is_that_of_the_pipeline():
    pipe = flux_pipeline()
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(pack(x), pipe._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 3, 4), x)


def test_flux_without_guidance_embedding_refuses_a_scale():
    policy = FlowPolicy(flux_pipeline(guidance_embeds=False), max_prompt_tokens=3)
    assert policy.evaluate(trajectories_of(policy)).log_prob.isfinite().all()
    with pytest.raises(ConfigError, match=r"no guidance embedding.*got 3\.5"):
        FlowPolicy(flux_pipeline(guidance_embeds=False), guidance_scale=3.5)
    with pytest.raises(ConfigError, match=r"at least 1 \(1: none\); got 0\.5"):
        FlowPolicy(sd3_pipeline(), guidance_scale=0.5)


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
def test_only_the_transformer_trains(make):
    policy = policy_of(make)
    for name, part in policy.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            trains = {p.requires_grad for p in part.parameters()}
            assert trains == {name == "transformer"}, name
            assert not part.training


# Prompts.


def test_embeddings_are_the_pipelines_and_each_text_is_encoded_once():
    policy = policy_of(guidance_scale=2.0)
    calls = []
    original = policy.pipe.encode_prompt
    policy.pipe.encode_prompt = lambda text, *a, **k: calls.append(text) or original(text, *a, **k)
    first = policy.encode([*PROMPTS, Prompt(11, "draw 42")])
    again = policy.encode(PROMPTS[::-1])
    assert sorted(calls) == ["", "draw 42", "red circle"]
    assert len(first) == 3
    expected = original("red circle", None, None, max_sequence_length=3, negative_prompt="")
    torch.testing.assert_close(first.embeddings["text"][1:2], expected[0])
    torch.testing.assert_close(first.embeddings["pooled"][1:2], expected[2])
    torch.testing.assert_close(first.negative["text"], expected[1])
    torch.testing.assert_close(again.embeddings["text"], first.embeddings["text"][[1, 0]])


def test_the_cache_forgets_what_was_used_least_recently():
    class Encoder:
        calls = ()

        def encode(self, text, *, device, max_length):
            self.calls += (text,)
            return {"text": torch.full((1, 2), float(len(text)))}

    encoder = Encoder()
    cache = PromptCache(encoder, max_length=None, capacity=2)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        assert cache.get([text], torch.device("cpu"))["text"][0, 0] == len(text)
    assert encoder.calls == ("a", "bb", "ccc", "bb")


def test_a_model_made_without_t5_gets_no_t5_tokens():
    narrow = FlowPolicy(sd3_pipeline())  # width 32 = 16 + 16 of the two CLIPs
    assert narrow.encode(PROMPTS).embeddings["text"].shape == (2, 24, 32)
    wide = FlowPolicy(sd3_pipeline(joint_attention_dim=40))
    assert wide.encode(PROMPTS).embeddings["text"].shape == (2, 24 + 256, 40)
    assert policy_of().encode(PROMPTS).embeddings["text"].shape == (2, 24 + 3, 32)


def test_prompts_that_are_no_plain_text_are_refused():
    policy = policy_of()
    with pytest.raises(DataError, match=r"Row 5.*chat messages"):
        policy.encode([Prompt(5, [{"role": "user", "content": "draw"}])])
    with pytest.raises(DataError, match=r"Row 5.*images"):
        policy.encode([Prompt(5, "draw", images=(object(),))])


def test_released_encoders_come_back():
    policy = policy_of()
    policy.release_encoders()
    assert policy.encode(PROMPTS).embeddings["text"].isfinite().all()


# Payload.


def payload_of(value: float, prompts: int, rows: list[int], **rule) -> LatentPayload:
    embeddings = {"text": value + torch.arange(prompts).float()[:, None].repeat(1, 2)}
    return LatentPayload(
        LatentPrompts(embeddings, 2.0, {"text": torch.zeros(1, 2)}),
        torch.tensor(rows),
        value + torch.randn(len(rows), 5, 1, 2, 2),
        SIGMAS,
        StepRule(**{"kernel": "cps", "eta": 0.8, "sigma_max": 0.9, **rule}),
    )


def texts(payload: LatentPayload) -> list[float]:
    return payload.prompts.rows(payload.prompt_row)["text"][:, 0].tolist()


def test_payload_stores_a_prompt_once_and_keeps_rows_with_their_prompts():
    one, two = payload_of(10, 3, [0, 0, 1, 2]), payload_of(20, 2, [0, 1, 1])
    both = LatentPayload.cat([one, two])
    assert texts(both) == [10, 10, 11, 12, 20, 21, 21]
    rows = torch.tensor([6, 2, 5])
    part = both.select(rows)
    assert texts(part) == [21, 11, 21]
    assert len(part.prompts) == 2
    assert torch.equal(part.latents, both.latents[rows])
    moved = part.to(torch.device("meta"))
    assert moved.latents.is_meta
    assert moved.prompts.embeddings["text"].is_meta
    assert moved.prompts.negative["text"].is_meta


def test_rollouts_drawn_differently_are_not_joined():
    with pytest.raises(ValueError, match=r"eta=0\.5.*against.*eta=0\.8"):
        LatentPayload.cat([payload_of(0, 1, [0]), payload_of(0, 1, [0], eta=0.5)])


# Adapters, export and reference.


def _nudge(policy: FlowPolicy) -> None:
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 8.0, "targets": None}])
def test_the_reference_is_the_model_before_training(make, lora):
    policy = policy_of(make, lora=lora)
    trajectories = trajectories_of(policy)
    start = policy.evaluate(trajectories).log_prob.detach()
    _nudge(policy)
    assert (policy.evaluate(trajectories).log_prob - start).abs().max() > 1e-3
    assert policy.has_reference
    with policy.reference(), torch.no_grad():
        torch.testing.assert_close(policy.evaluate(trajectories).log_prob, start, **CLOSE)


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
def test_an_adapter_changes_nothing_at_first_and_trains_alone(make):
    plain, adapted = policy_of(make), policy_of(make, lora={"rank": 2, "alpha": 4.0})
    trajectories = trajectories_of(plain)
    torch.testing.assert_close(
        adapted.evaluate(trajectories).log_prob, plain.evaluate(trajectories).log_prob, **CLOSE
    )
    trained = [name for name, p in adapted.network.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    layers = {name.split(".lora_")[0].split("attn.")[1] for name in trained}
    assert {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"} <= layers


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
def test_exported_adapters_load_in_peft_in_diffusers_and_here(make, tmp_path):
    from peft import PeftModel

    options = {"rank": 2, "alpha": 8.0}  # a scale of 4, which a loader must not lose
    policy = policy_of(make, lora=options)
    trajectories = trajectories_of(policy)
    _nudge(policy)
    expected = policy.evaluate(trajectories).log_prob.detach()
    policy.export(tmp_path)
    through_peft, through_diffusers = policy_of(make), policy_of(make)
    with torch.no_grad():
        before = through_peft.evaluate(trajectories).log_prob
        assert (before - expected).abs().max() > 1e-2
        through_peft.network = PeftModel.from_pretrained(through_peft.network, tmp_path)
        torch.testing.assert_close(
            through_peft.evaluate(trajectories).log_prob, expected, rtol=1e-4, atol=1e-4
        )
        through_diffusers.pipe.load_lora_weights(tmp_path)
        torch.testing.assert_close(
            through_diffusers.evaluate(trajectories).log_prob, expected, rtol=1e-4, atol=1e-4
        )
        again = policy_of(make, lora=options)
        again.load_export(tmp_path)
        assert torch.equal(again.evaluate(trajectories).log_prob, expected)


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
def test_exported_pipelines_load_in_diffusers_and_here(make, tmp_path):
    from diffusers import DiffusionPipeline

    policy = policy_of(make)
    trajectories = trajectories_of(policy)
    _nudge(policy)
    expected = policy.evaluate(trajectories).log_prob.detach()
    policy.export(tmp_path / "hf")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if make is sd3_pipeline else {}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "hf", **absent)
    assert type(loaded) is type(policy.pipe)
    with torch.no_grad():
        for fresh in (
            FlowPolicy(loaded, max_prompt_tokens=3),
            FlowPolicy(tmp_path / "hf", max_prompt_tokens=3),
        ):
            assert torch.equal(fresh.evaluate(trajectories).log_prob, expected)
        again = policy_of(lambda: make(seed=5))
        again.load_export(tmp_path / "hf")
        assert torch.equal(again.evaluate(trajectories).log_prob, expected)
    with pytest.raises(ModelError, match="does not exist"):
        policy.load_export(tmp_path / "nowhere")


def test_weights_of_another_model_do_not_load(tmp_path):
    policy_of(lambda: sd3_pipeline(num_layers=3)).export(tmp_path)
    with pytest.raises(ModelError, match="do not fit this model"):
        policy_of().load_export(tmp_path)


# Loading.


def test_a_folder_is_loaded_in_the_asked_dtype(tmp_path):
    sd3_pipeline().save_pretrained(tmp_path)
    policy = FlowPolicy(tmp_path, dtype="bfloat16", lora={"rank": 2, "alpha": 2.0})
    dtypes = {name: p.dtype for name, p in policy.network.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    assert policy.pipe.vae.dtype == torch.float32
    found = policy.evaluate(trajectories_of(policy), Request(prediction=True))
    assert {found.log_prob.dtype, found.prediction.dtype} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        policy = policy_of(gradient_checkpointing=checkpointing)
        policy.evaluate(trajectories_of(policy)).log_prob.sum().backward()
        gradients.append(policy.network.transformer_blocks[0].attn.to_q.weight.grad)
    torch.testing.assert_close(*gradients)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}/nothing does not exist"):
        FlowPolicy(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"model_index\.json cannot be read"):
        FlowPolicy(tmp_path)
    folder = tmp_path / "pipe"
    sd3_pipeline().save_pretrained(folder)
    (folder / "vae").rename(folder / "vea")
    with pytest.raises(ModelError, match="is incomplete: it has no vae"):
        FlowPolicy(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusion2Pipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"StableDiffusion2Pipeline.*mean 'StableDiffusionPipeline'"
    ):
        FlowPolicy(folder)


def test_a_model_that_predicts_noise_is_refused():
    from diffusers import DDIMScheduler

    pipe = sd3_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ModelError, match=r"predicts velocities.*DDIMScheduler"):
        FlowPolicy(pipe)
    pipe = sd3_pipeline()
    pipe.vae = None
    with pytest.raises(ModelError, match="has no vae"):
        FlowPolicy(pipe)
