"""A tiny random Wan pipeline of the real classes, with a VAE that compresses time by four."""

from __future__ import annotations

import torch
from fixtures_flow import t5_tokenizer

HEIGHT, WIDTH, NUM_FRAMES = 16, 32, 5
LATENT = (4, 2, 4, 8)
"""Channels, frames, rows and columns of such a clip's latents."""


def wan_pipeline(seed: int = 0, *, scheduler=None, **transformer):
    """``WanPipeline`` of about 50k parameters with a real UMT5 and a real causal 3D VAE."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    encoder = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    options = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16}
    network = WanTransformer3DModel(
        **{
            **options, "in_channels": 4, "out_channels": 4, "ffn_dim": 32, "num_layers": 2,
            "rope_max_seq_len": 32, **transformer,
        }
    )  # fmt: skip
    return WanPipeline(
        transformer=network.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
            temperal_downsample=[True, True], scale_factor_temporal=4, scale_factor_spatial=4,
            latents_mean=[-0.7, 0.3, 0.1, 1.5], latents_std=[2.8, 1.4, 0.6, 1.2],
        ).eval(),
        text_encoder=UMT5EncoderModel(encoder).eval(),
        tokenizer=tokenizer,
    )  # fmt: skip
