"""Tiny random pipelines of the real classes, built without any download."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp

import torch

WORDS = ("draw", "the", "number", "red", "blue", "circle", "square", "1", "2", "3", "42")
SIZE = 16
"""Pixels; the latents are half of it."""


def sd3_pipeline(seed: int = 0, **transformer):
    """``StableDiffusion3Pipeline`` of about 60k parameters, with a real CLIP pair and no T5."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    network = SD3Transformer2DModel(
        **{
            "sample_size": SIZE // 2,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
            **transformer,
        }
    )
    return StableDiffusion3Pipeline(
        transformer=_awake(network),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=CLIPTextModelWithProjection(_clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()).eval(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux_pipeline(seed: int = 0, *, guidance_embeds: bool = True):
    """``FluxPipeline`` with a real CLIP, a real T5 encoder and dynamic shifting."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    tokenizer_2 = t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(tokenizer_2), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return FluxPipeline(
        transformer=_awake(network),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
    )


def clip_tokenizer():
    """A real ``CLIPTokenizer`` over letters and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
    pieces = letters + [f"{letter}</w>" for letter in letters]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    folder = Path(mkdtemp())
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24
    )


def t5_tokenizer():
    """A real ``T5Tokenizer`` from a word list; nothing to download."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -3.0) for word in WORDS]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=16)


def _awake(network):
    """Random weights everywhere: fresh networks start with zero gates, which would hide errors."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def _vae(channels: int):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def _clip_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=74, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=24, projection_dim=8,
        bos_token_id=72, eos_token_id=73, pad_token_id=73,
    )  # fmt: skip
