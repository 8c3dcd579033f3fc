"""Tiny random pipelines that predict noise, of the real classes, built without any download."""

from __future__ import annotations

import torch
from fixtures_flow import SIZE, _awake, _clip_config, clip_tokenizer

SD_SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip
"""What Stable Diffusion 1.5, 2 and XL have in common."""


def sd15_pipeline(seed: int = 0, *, scheduler=None, **unet):
    """``StableDiffusionPipeline`` of about 40k parameters with SD 1.5's own kind of scheduler."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    network = _unet(**unet)
    pipe = StableDiffusionPipeline(
        unet=network,
        scheduler=scheduler or PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True),
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_pipeline(seed: int = 0, *, scheduler=None, **unet):
    """``StableDiffusionXLPipeline`` with two CLIPs, size conditions and an Euler scheduler."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    network = _unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        **unet,
    )
    pipe = StableDiffusionXLPipeline(
        unet=network,
        scheduler=scheduler or EulerDiscreteScheduler(**SD_SCHEDULE, timestep_spacing="leading"),
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()).eval(),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(**options):
    from diffusers import UNet2DConditionModel

    return _awake(
        UNet2DConditionModel(
            **{
                "sample_size": SIZE // 2,
                "in_channels": 4,
                "out_channels": 4,
                "layers_per_block": 1,
                "block_out_channels": (8, 16),
                "norm_num_groups": 4,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 16,
                "attention_head_dim": 4,
                **options,
            }
        )
    )


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, scaling_factor=0.18215,
    ).eval()  # fmt: skip
