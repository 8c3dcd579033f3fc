"""Tiny random token models of the real classes, built without any download."""

from __future__ import annotations

import torch
from PIL import Image

from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.protocols import Prompt

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}
TEXT_FAMILIES = {
    "qwen2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160},  # learned positions
    "gemma2": {  # a soft cap after the head, and a window shorter than the prompts
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
    },
    "granite": {"logits_scaling": 4.0},
    "qwen3": {"head_dim": 8},  # queries and keys are normed
    "llama": {},
}


def tiny_text(family: str = "qwen2", seed: int = 0, **changes):
    """A causal language model of about 30k parameters, and its byte tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer()
    options = {"vocab_size": len(tokenizer), **COMMON, **_ids(tokenizer), **TEXT_FAMILIES[family]}
    config = AutoConfig.for_model(family, **{**options, **changes})
    torch.manual_seed(seed)
    return _awake(AutoModelForCausalLM.from_config(config), tokenizer), tokenizer


VISION_FAMILIES = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32},
    "qwen2_5_vl": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}


def tiny_vision(family: str = "qwen2_vl", seed: int = 0):
    """A vision-language model of about 60k parameters, and its processor without torchvision."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = build_tokenizer(images=True)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**COMMON, "vocab_size": len(tokenizer), "head_dim": 8, "rope_parameters": rope}
    vision = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    config = AutoConfig.for_model(
        family,
        text_config={**text, **_ids(tokenizer)},
        vision_config={**vision, **VISION_FAMILIES[family]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        **_ids(tokenizer),
    )
    torch.manual_seed(seed)
    model = _awake(AutoModelForImageTextToText.from_config(config), tokenizer)
    return model, _processor(config, tokenizer)


def _processor(config, tokenizer):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mmgrpo.policies.loading import processor_for_images

    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
    )
    return processor_for_images(config, images, tokenizer)


def _ids(tokenizer):
    return {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def _awake(model, tokenizer):
    """Larger weights: a default initialisation answers almost uniformly, and hides mistakes."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.float().eval()


def text_prompts():
    """Prompts of different lengths, chat and plain."""
    return [
        Prompt(7, "2+2="),
        Prompt(3, [{"role": "user", "content": "What is 17 + 25? Think first."}]),
        Prompt(11, "a longer piece of plain text: "),
    ]


def canvas(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random RGB image."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def image_prompts():
    """Prompts with one, two and no image, of different sizes."""

    def ask(text, images):
        parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    return [
        Prompt(4, ask("Which digit?", 1), images=(canvas(16, 24),)),
        Prompt(2, ask("Add them.", 2), images=(canvas(32, 16, 1), canvas(16, 16, 2))),
        Prompt(9, ask("No picture here, only words.", 0)),
    ]


def trajectories_of(policy, prompts, rows, *, length=9, temperature=1.0, seed=0):
    """Random completions: ``rows`` maps each to its prompt; lengths vary from 1 to ``length``."""
    from mmgrpo.core.trajectories import Trajectories

    generator = torch.Generator().manual_seed(seed)
    encoded = policy.encode(prompts, max_new_tokens=length)
    prompt_row = torch.tensor(rows)
    ids = torch.randint(0, 250, (len(rows), length), generator=generator)
    lengths = torch.randint(1, length + 1, (len(rows),), generator=generator)
    lengths[0] = length
    return Trajectories(
        group=torch.tensor([prompt.index for prompt in prompts])[prompt_row],
        mask=torch.arange(length) < lengths[:, None],
        payload=policy.payload(encoded, prompt_row, ids, temperature),
    )


@torch.no_grad()
def distributions(model, trajectories, row, **inputs):
    """``[n, V]`` log-probabilities of a row's n tokens: one row, no padding, no cache, no tricks.

    ``inputs`` are the prompt's further inputs; per-token ones are continued with zeros.
    """
    payload = trajectories.payload
    mask = payload.prompts.mask[payload.prompt_row[row]]
    prompt = payload.prompts.ids[payload.prompt_row[row]][mask]
    completion = payload.completion_ids[row]
    ids = torch.cat([prompt, completion])[None]
    for name, value in inputs.items():
        if value.shape == (1, len(prompt)):
            blank = value.new_zeros(1, len(completion))
            inputs[name] = torch.cat([value, blank], dim=1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
    return (logits[len(prompt) - 1 : -1].float() / payload.temperature[row]).log_softmax(-1)


def with_moved_adapter(policy):
    """The policy; an adapter, which changes nothing while it is fresh, is moved."""
    from mmgrpo.policies.adapters import has_adapter, trainable_parameters

    generator = torch.Generator().manual_seed(3)
    moved = trainable_parameters(policy.network) if has_adapter(policy.network) else {}
    with torch.no_grad():
        for parameter in moved.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def gradients(policy, evaluation):
    """Gradient of an uneven sum of log-probabilities and entropies, as a list."""
    from mmgrpo.policies.adapters import trainable_parameters

    weight = torch.linspace(0.5, 2.0, evaluation.log_prob.numel()).view_as(evaluation.log_prob)
    loss = (evaluation.log_prob * weight).sum() + 0.3 * (evaluation.entropy * weight).sum()
    return torch.autograd.grad(loss, list(trainable_parameters(policy.network).values()))


def relative_error(found, expected):
    """L2 norm of the difference of two lists of tensors, over that of the second."""
    found, expected = (torch.cat([t.flatten() for t in ts]) for ts in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()
