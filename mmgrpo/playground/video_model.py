"""The untrained video model: a complete ``WanPipeline`` of a fifth of a million weights.

Only the transformer learns. A random UMT5 encoder carries the prompt, and the autoencoder copies.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from mmgrpo.playground.tiny_video_vae import copying_video_vae

NUM_FRAMES, SIZE = 3, 16
DIRECTIONS = ("right", "left", "down", "up")
# Mean and standard deviation of the training clips in [-1, 1]: latents are standardised.
LATENT_MEAN, LATENT_STD = -0.85, 0.46
# "the", "digit", the digit, "moves", the direction, end. Pass it as ``max_sequence_length``: the
# model never met the zeros that fill up the default of 512.
NUM_TOKENS = 6
_TEXT_WIDTH = 32
# A small network learns to read a prompt only if its words make a difference from the start.
_TEXT_SCALE = 8.0


def build_tokenizer() -> T5Tokenizer:
    """Builds a T5 tokenizer in which each word of a prompt is one token."""
    words = ["the", "digit", "moves", *DIRECTIONS, *map(str, range(10))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = [*special, ("\u2581", -1.0), *((f"\u2581{word}", 0.0) for word in words)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Builds a random, frozen one-layer UMT5 encoder; its states tell the words apart."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=_TEXT_WIDTH,
        d_kv=8,
        d_ff=_TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
    )
    encoder = UMT5EncoderModel(config)
    encoder.encoder.final_layer_norm.weight.data.fill_(_TEXT_SCALE)
    return encoder.requires_grad_(False).eval()


def build_pipeline(seed: int) -> WanPipeline:
    """Builds the untrained pipeline.

    Args:
        seed: Fixes the text encoder and the initial weights.

    Returns:
        A pipeline whose latents are ``[B, 1, 3, 16, 16]``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        encoder = build_text_encoder(tokenizer)
        transformer = WanTransformer3DModel(
            patch_size=(1, 4, 4),
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=1,
            out_channels=1,
            text_dim=_TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=192,
            num_layers=3,
            rope_max_seq_len=32,
        )
    return WanPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=copying_video_vae(LATENT_MEAN, LATENT_STD),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


@torch.no_grad()
def encode_prompts(pipeline: WanPipeline, prompts: list[str]) -> Tensor:
    """Encodes prompts: ``[B, 6, 32]`` token states, zeros after the end of a prompt."""
    states, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=NUM_TOKENS
    )
    return states
