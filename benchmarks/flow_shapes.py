"""Image flow models with random weights: two of published shape, and a tiny one of either family.

Only the network has the published size. Text encoders are as small as their output widths allow,
and the autoencoder, which is never called, has only its number of channels and its scale of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from mmgrpo.playground.image_model import build_clip_tokenizer, build_t5_tokenizer
from mmgrpo.playground.tiny_vae import plain_autoencoder
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.loading import parse_dtype

CLIP_TOKENS = 77
CLIP_WIDTH = 32
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Shape:
    """A network's sizes and how a benchmark trains it.

    Attributes:
        wrap: builds the pipeline around a network, whose sizes it also gets.
        kind: class of the network.
        sizes: its arguments.
        t5_tokens: of a prompt; None takes the family's own number.
        lora: rank of the adapter; 0 trains every weight.
        checkpointing: whether activations are computed again in the backward pass.
    """

    wrap: Callable[[Any, Mapping[str, Any]], Any]
    kind: Callable[..., Any]
    sizes: Mapping[str, Any]
    t5_tokens: int | None = None
    lora: int = 0
    checkpointing: bool = False


def build_policy(
    shape: Shape, *, device: str, dtype: str, lora: int, checkpointing: bool = False
) -> FlowPolicy:
    """Build a policy without a reference, its network made in place and in its dtype.

    Args:
        shape: what to build.
        device: of the network; ``meta`` makes no weights.
        dtype: name of the network's dtype.
        lora: rank of the adapter; 0 trains every weight.
        checkpointing: compute activations again in the backward pass.
    """
    with making(device, parse_dtype(dtype)):
        network = shape.kind(**shape.sizes)
    return FlowPolicy(
        shape.wrap(network, shape.sizes),
        dtype=dtype,
        lora={"rank": lora, "alpha": 2.0 * lora} if lora else None,
        reference="none",
        gradient_checkpointing=checkpointing,
        max_prompt_tokens=shape.t5_tokens,
    )


@contextmanager
def making(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within the context, new weights are made on a device in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _sd3(network: Any, sizes: Mapping[str, Any]) -> Any:
    """Two CLIPs and no T5, in whose place the pipeline puts zeros."""
    tokenizer = _clip_tokenizer()
    encode = partial(_clip, CLIPTextModelWithProjection, tokenizer, CLIP_WIDTH)
    half = sizes["pooled_projection_dim"] // 2
    return StableDiffusion3Pipeline(
        transformer=network, vae=_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encode(half), tokenizer=tokenizer,
        text_encoder_2=encode(half), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _flux(network: Any, sizes: Mapping[str, Any]) -> Any:
    """A CLIP of one layer and a T5 of one thin layer."""
    tokenizer, tokenizer_2 = _clip_tokenizer(), build_t5_tokenizer()
    width = sizes["pooled_projection_dim"]
    t5 = T5Config(
        vocab_size=len(tokenizer_2), d_model=sizes["joint_attention_dim"],
        d_kv=8, d_ff=8, num_layers=1, num_heads=1,
    )  # fmt: skip
    return FluxPipeline(
        transformer=network, vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=_clip(CLIPTextModel, tokenizer, width, width), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5), tokenizer_2=tokenizer_2,
    )  # fmt: skip


def _clip_tokenizer() -> Any:
    tokenizer = build_clip_tokenizer()
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _clip(kind: Any, tokenizer: Any, width: int, projection: int) -> Any:
    """A random encoder of one layer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width,
        projection_dim=projection, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=CLIP_TOKENS, **{name: getattr(tokenizer, name) for name in names},
    )  # fmt: skip
    return kind(config)


def _vae() -> Any:
    return plain_autoencoder((4,) * 4, latent_channels=LATENT_CHANNELS)


SD3 = {
    "patch_size": 2, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS,
    "qk_norm": "rms_norm",
}  # fmt: skip
FLUX = {"in_channels": 4 * LATENT_CHANNELS, "guidance_embeds": True}
"""What networks of a family have in common."""

SHAPES: Mapping[str, Shape] = {
    "tiny-sd3": Shape(
        _sd3, SD3Transformer2DModel,
        {**SD3, "sample_size": 64, "num_layers": 2, "num_attention_heads": 2,
         "attention_head_dim": 16, "caption_projection_dim": 32, "joint_attention_dim": 96,
         "pooled_projection_dim": 32, "pos_embed_max_size": 64, "dual_attention_layers": (0,)},
        t5_tokens=8,
    ),
    "tiny-flux": Shape(
        _flux, FluxTransformer2DModel,
        {**FLUX, "num_layers": 1, "num_single_layers": 2,
         "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32,
         "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)},
        t5_tokens=8,
        lora=4,
        checkpointing=True,
    ),
    "sd3.5-medium": Shape(
        _sd3, SD3Transformer2DModel,
        {**SD3, "sample_size": 128, "num_layers": 24, "num_attention_heads": 24,
         "attention_head_dim": 64, "caption_projection_dim": 1536, "joint_attention_dim": 4096,
         "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
         "dual_attention_layers": tuple(range(13))},
    ),
    "flux.1-dev": Shape(
        _flux, FluxTransformer2DModel,
        {**FLUX, "num_layers": 19, "num_single_layers": 38,
         "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
         "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56)},
        lora=32,
        checkpointing=True,
    ),
}  # fmt: skip
"""All weights of FLUX.1-dev with gradients, masters and moments would take 190 GB."""
