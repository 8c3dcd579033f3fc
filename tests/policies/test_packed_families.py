"""Qwen-Image and FLUX Kontext against the diffusers pipelines themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures_flow import SIZE, flux_pipeline
from PIL import Image

from mmgrpo.core.diffusion import linear_shift
from mmgrpo.errors import DataError, ModelError
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.flow_families.packing import pack, unpack
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.flow import FlowEngine

pytest.importorskip("diffusers")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 network calls of different batch sizes
STEPS = 4
TEXTS = ("a", "bcd efg")


def qwen_pipeline(seed: int = 0):
    """``QwenImagePipeline`` with a real Qwen2.5-VL text encoder and the real autoencoder."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.0],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 200, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "intermediate_size": 16,
        },
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=byte_tokenizer(),
        transformer=network.eval(),
    )


def byte_tokenizer():
    """A Qwen2 tokenizer of bytes, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:199]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[0])


def kontext_pipeline():
    """``FluxKontextPipeline`` of the parts of a tiny FLUX."""
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux_pipeline().components)


def drawing(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def engine_of(policy, **options):
    size = {"height": SIZE, "width": SIZE, "num_steps": STEPS}
    return FlowEngine(policy, **{**size, **options})


def gap(mine, theirs) -> int:
    return int(np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max())


# -- Qwen-Image ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_qwen_draws_what_its_pipeline_draws(guidance):
    """Also with prompts of different lengths in a batch, and with guidance of kept length."""
    policy = FlowPolicy(qwen_pipeline(), guidance_scale=guidance, max_prompt_tokens=400)
    prompts = [Prompt(place, text) for place, text in enumerate(TEXTS)]
    rollout = engine_of(policy, kernel="ode").generate(prompts, group_size=2, seed=3)
    latents, pipe = rollout.trajectories.payload.latents, policy.pipe
    pipe.set_progress_bar_config(disable=True)
    for row, sample in enumerate(rollout.samples):
        options = {
            "prompt": sample.prompt.content, "negative_prompt": "", "true_cfg_scale": guidance,
            "height": SIZE, "width": SIZE, "num_inference_steps": STEPS,
            "latents": pack(latents[row, :1]), "max_sequence_length": 400,
        }  # fmt: skip
        end = pipe(**options, output_type="latent").images
        torch.testing.assert_close(latents[row, -1:], unpack(end, 4, 4), **CLOSE)
        assert gap(sample.image, pipe(**options).images[0]) <= 1


def test_qwen_s_padding_does_not_reach_the_image():
    short, long = (FlowPolicy(qwen_pipeline(), max_prompt_tokens=n) for n in (300, 340))
    x, sigma, row = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([0])
    found = []
    for policy in (short, long):
        prompts = policy.encode([Prompt(0, "abc")])
        mask = prompts.embeddings["text_mask"]
        assert 0 < int(mask.sum()) < mask.shape[1]
        found.append(policy.velocity(x, sigma, prompts, row))
    torch.testing.assert_close(*found, **CLOSE)


def test_qwen_s_guided_tokens_keep_their_length():
    family = FlowPolicy(qwen_pipeline()).family
    no, yes = torch.randn(2, 3, 4, 8, 8)
    guided = family.guided(no, yes, 3.0)
    torch.testing.assert_close(pack(guided).norm(dim=-1), pack(yes).norm(dim=-1))
    plain = pack(no + 3 * (yes - no))
    cosine = torch.cosine_similarity(pack(guided), plain, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_qwen_s_images_come_back_from_their_latents():
    """Encoding undoes the standardisation that decoding does."""
    family = FlowPolicy(qwen_pipeline()).family
    image = drawing(1)
    latents = family.from_images([image], height=SIZE, width=SIZE, device=torch.device("cpu"))
    vae = family.pipe.vae
    pixels = family.pipe.image_processor.preprocess(image, height=SIZE, width=SIZE)
    with torch.no_grad():
        raw = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.1, -0.2, 0.3, 0], [1.5, 0.7, 2, 1]))
    torch.testing.assert_close(latents * std + mean, raw, **CLOSE)


def test_a_qwen_with_embedded_guidance_is_refused():
    pipe = qwen_pipeline()
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ModelError, match="guidance_embeds"):
        FlowPolicy(pipe)


# -- FLUX Kontext -------------------------------------------------------------------------------


def test_kontext_edits_as_its_pipeline_does():
    policy = FlowPolicy(kontext_pipeline(), max_prompt_tokens=3, guidance_scale=2.5)
    prompts = [Prompt(place, text, images=(drawing(place),)) for place, text in enumerate(TEXTS)]
    rollout = engine_of(policy, kernel="ode").generate(prompts, group_size=2, seed=5)
    latents, pipe = rollout.trajectories.payload.latents, policy.pipe
    pipe.set_progress_bar_config(disable=True)
    for row, sample in enumerate(rollout.samples):
        end = pipe(
            image=sample.prompt.images[0], prompt=sample.prompt.content, guidance_scale=2.5,
            height=SIZE, width=SIZE, max_area=SIZE**2, num_inference_steps=STEPS,
            latents=pack(latents[row, :1]), max_sequence_length=3, output_type="latent",
            _auto_resize=False,
        ).images  # fmt: skip
        torch.testing.assert_close(latents[row, -1:], unpack(end, 4, 4), **CLOSE)


def test_kontext_looks_at_its_own_image_in_rollout_and_update():
    policy = FlowPolicy(kontext_pipeline(), max_prompt_tokens=3)
    one, other = ([Prompt(0, "a", images=(drawing(seed),))] for seed in (1, 2))
    engine = engine_of(policy, kernel="flow_sde")
    rollouts = [engine.generate(prompts, group_size=2, seed=5) for prompts in (one, other)]
    ends = [rollout.trajectories.payload.latents[:, -1] for rollout in rollouts]
    assert not torch.allclose(*ends, atol=1e-3)
    for rollout in rollouts:
        found = policy.evaluate(rollout.trajectories.select(torch.tensor([1]))).log_prob
        torch.testing.assert_close(found, rollout.trajectories.old_log_prob[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("images", [(), (1, 2)])
def test_kontext_wants_one_image(images):
    policy = FlowPolicy(kontext_pipeline(), max_prompt_tokens=3)
    prompt = Prompt(3, "a", images=tuple(map(drawing, images)), source="data.jsonl:4")
    with pytest.raises(DataError, match=rf"data.jsonl:4.*with 1 images; got {len(images)} images"):
        policy.check([prompt])


@pytest.mark.parametrize("make", [qwen_pipeline, kontext_pipeline])
def test_adapters_train_and_folders_load_again(make, tmp_path):
    pipe = make()
    policy = FlowPolicy(pipe, max_prompt_tokens=300, lora={"rank": 2, "alpha": 4})
    assert policy.family.present_targets()
    pipe.save_pretrained(tmp_path / "pipe")
    again = FlowPolicy(str(tmp_path / "pipe"), max_prompt_tokens=300)
    assert type(again.pipe) is type(pipe)
    schedule = again.family.schedule(4, height=SIZE, width=SIZE)
    assert not torch.allclose(schedule, linear_shift(4, shift=1.0))
