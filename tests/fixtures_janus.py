"""A tiny random Janus of the real class: 2 x 2 codes, built without any download."""

from __future__ import annotations

import torch
from tokenizers import AddedToken

from mmgrpo.config.image_layout import ImageLayout
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.policies.image_tokens import Parts
from mmgrpo.policies.janus import MARKERS

CELLS, CODES = 4, 11


def janus_tokenizer():
    """A byte tokenizer with the published models' markers."""
    tokenizer = build_tokenizer()
    names = [AddedToken(name, special=True) for name in ("<pad image>", *MARKERS.values())]
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer


def janus_model(tokenizer, seed=0, **text):
    """``JanusForConditionalGeneration`` of 60 thousand weights."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    size = 16
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer) + 5, "hidden_size": size,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 128, **text,
        },
        vision_config={
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
            "patch_size": 4, "projection_dim": size, "num_image_tokens": CELLS,
        },
        vq_config={
            "num_embeddings": CODES, "embed_dim": 6, "base_channels": 32, "latent_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": size,
            "image_token_embed_dim": size,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<pad image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():  # a default initialisation draws almost uniformly, and hides mistakes
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
        model.model.generation_head.vision_head.weight.mul_(4.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def janus_layout(tokenizer, model):
    """Where its codes are."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MARKERS.items()}
    first = model.config.text_config.vocab_size
    return ImageLayout(grid=[2, 2], code_offset=first, num_codes=CODES, **ids)


def janus_parts(seed=0, **text):
    """The parts of a policy."""
    tokenizer = janus_tokenizer()
    model = janus_model(tokenizer, seed, **text)
    return Parts(model, tokenizer, janus_layout(tokenizer, model), None)


def save_janus(parts, folder):
    """Write what a published folder holds; the layout is not in it."""
    parts.model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    return folder
