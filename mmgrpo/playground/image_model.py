"""The untrained image models: complete ``StableDiffusion3Pipeline``s of half a million weights.

Only the transformer learns. Two random CLIP encoders carry the prompt. The third encoder, a T5, is
there because a stock ``from_pretrained`` insists on it, and silent: it yields zeros, which is also
what the pipeline puts in its place when it is left out (``text_encoder_3=None``).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mmgrpo.playground.tiny_vae import copying_vae

HEIGHT, WIDTH = 8, 16
# Mean and inverse standard deviation of the training digits in [-1, 1]: latents are standardised.
SHIFT_FACTOR, SCALING_FACTOR = -0.389, 1.329
# Start, "the", "number", two digits, end, and two of padding.
NUM_CLIP_TOKENS = 8
# "the", "number", the number, end. Pass it as ``max_sequence_length``: the default of 256 draws as
# well, several times slower.
NUM_T5_TOKENS = 4
DEFAULT_T5_TOKENS = 256
_CLIP_WIDTH = 32
_T5_WIDTH = 2 * _CLIP_WIDTH


def build_clip_tokenizer() -> CLIPTokenizer:
    """Builds a CLIP tokenizer that knows letters, digits and the two words of the prompts."""
    merges: list[tuple[str, str]] = []
    for word in ("the", "number"):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(pieces[:end]), pieces[end]) for end in range(1, len(pieces))]
    symbols = [*string.ascii_lowercase, *string.digits]
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]  # pairs, although it is annotated as strings
        model_max_length=NUM_CLIP_TOKENS,
    )


NUMBER_WORDS = ("the", "number", *(f"{number:02d}" for number in range(100)))


@dataclass(frozen=True)
class Design:
    """What a model draws on, and with which words it is asked.

    Attributes:
        latents: Channels, height and width of the latents.
        patch_size: Side of the square of latents that is one token of the transformer.
        clip_tokenizer: Makes the tokenizer of both CLIP encoders.
        words: What the T5 tokenizer knows.
        num_t5_tokens: Of the longest prompt, its end included.
    """

    latents: tuple[int, int, int] = (1, HEIGHT, WIDTH)
    patch_size: int = 2
    clip_tokenizer: Callable[[], CLIPTokenizer] = build_clip_tokenizer
    words: Sequence[str] = NUMBER_WORDS
    num_t5_tokens: int = NUM_T5_TOKENS


NUMBERS = Design()


def build_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Builds a random, frozen one-layer CLIP text encoder.

    The pipeline reads the states before the last layer, here token plus position embeddings. At
    unit scale these tell every digit at every place apart, so the encoder need not be trained.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_CLIP_WIDTH,
        intermediate_size=2 * _CLIP_WIDTH,
        projection_dim=_CLIP_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for table in encoder.modules():
        if isinstance(table, torch.nn.Embedding):
            torch.nn.init.normal_(table.weight)
    return encoder.requires_grad_(False).eval()


def build_t5_tokenizer(words: Sequence[str] = NUMBER_WORDS) -> T5Tokenizer:
    """Builds a T5 tokenizer in which each word of a prompt, also its number, is one token."""
    pieces = [f"\u2581{word}" for word in words]
    pieces += ["\u2581", *string.ascii_lowercase, *string.digits]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [(piece, -float(len(piece) == 1)) for piece in pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=DEFAULT_T5_TOKENS)


def build_silent_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Builds the smallest T5 encoder, with an output norm of weight zero: its states are zeros."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=_T5_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1
    )
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder.requires_grad_(False).eval()


def build_pipeline(
    seed: int, design: Design = NUMBERS, vae: AutoencoderKL | None = None
) -> StableDiffusion3Pipeline:
    """Builds the untrained pipeline.

    Args:
        seed: Fixes the text encoders and the initial weights.
        design: What it draws on.
        vae: Its autoencoder; None for one that copies gray pictures.

    Returns:
        A pipeline whose latents are ``[B, *design.latents]``.
    """
    channels, _, width = design.latents
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_tokenizer, t5_tokenizer = design.clip_tokenizer(), build_t5_tokenizer(design.words)
        clip_encoders = [build_clip_encoder(clip_tokenizer) for _ in range(2)]
        transformer = SD3Transformer2DModel(
            sample_size=width,
            patch_size=design.patch_size,
            in_channels=channels,
            out_channels=channels,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=_T5_WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=2 * _CLIP_WIDTH,
            pos_embed_max_size=width // design.patch_size,
            qk_norm="rms_norm",
        )
        t5_encoder = build_silent_t5(t5_tokenizer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae or copying_vae(SCALING_FACTOR, SHIFT_FACTOR),
        text_encoder=clip_encoders[0],
        tokenizer=clip_tokenizer,
        text_encoder_2=clip_encoders[1],
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5_encoder,
        tokenizer_3=t5_tokenizer,
    )


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], num_t5_tokens: int = NUM_T5_TOKENS
) -> tuple[Tensor, Tensor]:
    """Encodes prompts without guidance.

    Returns:
        Token states ``[B, T, 64]``, the last ``num_t5_tokens`` of them zero, and pooled states
        ``[B, 64]``; T is 12 for numbers.
    """
    states, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=num_t5_tokens,
    )
    return states, pooled
