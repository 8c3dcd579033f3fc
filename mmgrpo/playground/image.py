"""The image task: draw a two-digit number in handwritten digits, asked for as "the number 42".

``build_image`` writes an ordinary ``StableDiffusion3Pipeline`` folder of half a million weights,
two digit classifiers (a reward and a held-out judge) and the prompts. The base model is half-trained
on purpose: part of the pictures it learned from showed other digits than their prompt said, so what
it draws are digits, but often the wrong ones. The right ones are always among its samples, which is
what reinforcement learning needs.
"""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from mmgrpo.playground.classifier import (
    DIGIT_SIZE,
    digit_accuracy,
    save_classifier,
    to_rgb,
    train_classifier,
)
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.tiny_vae import copying_vae

Progress = Callable[[str], None]

NUM_DIGITS = 2
HEIGHT, WIDTH = DIGIT_SIZE, DIGIT_SIZE * NUM_DIGITS
# Start, "the", "number", two digits, end, and two of padding.
MAX_TEXT_TOKENS = 8
TEXT_WIDTH = 32
# Zero tokens that StableDiffusion3Pipeline appends by default in place of a third text encoder.
DEFAULT_PADDING = 256
# Mean and inverse standard deviation of the training digits in [-1, 1]: latents are standardised.
SHIFT_FACTOR, SCALING_FACTOR = -0.389, 1.329
_EMPTY_PROMPT = 10**NUM_DIGITS


@dataclass(frozen=True)
class Pretraining:
    """How the base model is trained, and how far.

    Attributes:
        steps: Optimiser steps.
        batch_size: Canvases per step.
        learning_rate: Peak of a one-cycle schedule.
        wrong_digit_rate: Probability that a digit's picture is drawn from a random class.
        empty_prompt_rate: Probability of an empty prompt, so that guidance has something to
            contrast with.
        padded_every: Every so many steps a quarter of the batch is trained with the zero tokens that
            a pipeline without a third text encoder appends unless told otherwise; a model that
            never met them would be drowned in them.
        ema_decay: Decay of the weight average that is saved.
    """

    steps: int = 1600
    batch_size: int = 64
    learning_rate: float = 2e-3
    wrong_digit_rate: float = 0.2
    empty_prompt_rate: float = 0.1
    padded_every: int = 8
    ema_decay: float = 0.99


def prompt_row(number: int) -> dict[str, object]:
    """Returns the data row of one number: its prompt, its digits as labels, and its digits as text."""
    answer = f"{number:0{NUM_DIGITS}d}"
    return {
        "prompt": f"the number {answer}",
        "labels": [int(digit) for digit in answer],
        "answer": answer,
    }


def is_held_out(number: int) -> bool:
    """Tells whether a number is kept for evaluation.

    The rule picks 20 of 100 numbers such that every digit occurs twice at each place.
    """
    tens, units = divmod(number, 10)
    return (units - 3 * tens) % 5 == 0


def all_prompts() -> list[str]:
    """Returns the prompts of 00 ... 99 in order, and the empty prompt last."""
    return [str(prompt_row(number)["prompt"]) for number in range(10**NUM_DIGITS)] + [""]


def build_tokenizer() -> CLIPTokenizer:
    """Builds a CLIP tokenizer that knows letters, digits and the two words of the prompts."""
    merges: list[tuple[str, str]] = []
    for word in ("the", "number"):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(pieces[:end]), pieces[end]) for end in range(1, len(pieces))]
    symbols = [*string.ascii_lowercase, *string.digits]
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TEXT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Builds a random, frozen one-layer CLIP text encoder.

    The pipeline reads the states before the last layer, here token plus position embeddings. At
    unit scale these tell every digit at every place apart, so the encoder need not be trained.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for table in encoder.modules():
        if isinstance(table, torch.nn.Embedding):
            torch.nn.init.normal_(table.weight)
    return encoder.requires_grad_(False).eval()


def build_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """Builds the untrained pipeline; its third text encoder is left out.

    Args:
        seed: Fixes the text encoders and the initial weights.

    Returns:
        A pipeline whose latents are ``[B, 1, 8, 16]``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoders = [build_text_encoder(tokenizer) for _ in range(2)]
        transformer = SD3Transformer2DModel(
            sample_size=WIDTH,
            patch_size=2,
            in_channels=1,
            out_channels=1,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=WIDTH // 2,
            qk_norm="rms_norm",
        )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=copying_vae(SCALING_FACTOR, SHIFT_FACTOR),
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Encodes prompts without the tokens of the absent third encoder.

    Returns:
        Token states ``[B, 8, 64]`` and pooled states ``[B, 64]``.
    """
    states, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=0,
    )
    return states, pooled


class DigitBook:
    """Training digits sorted by class, so that a batch of canvases is one lookup.

    Args:
        pixels: uint8 ``[N, 8, 8]``.
        labels: int64 ``[N]`` in 0 ... 9.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        order = np.argsort(labels, kind="stable")
        self.pictures = torch.from_numpy(pixels[order])
        self.counts = torch.bincount(torch.from_numpy(labels), minlength=10)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, numbers: Tensor, wrong_digit_rate: float, generator: torch.Generator) -> Tensor:
        """Puts random digits side by side.

        Args:
            numbers: int64 ``[B]`` in 0 ... 99.
            wrong_digit_rate: Probability, for each digit, of a random class instead of the right one.
            generator: Source of all randomness.

        Returns:
            Gray canvases ``[B, 1, 8, 16]`` in [-1, 1].
        """
        digits = torch.stack([numbers // 10, numbers % 10], dim=1)
        wrong = torch.rand(digits.shape, generator=generator) < wrong_digit_rate
        random_digits = torch.randint(0, 10, digits.shape, generator=generator)
        digits = torch.where(wrong, random_digits, digits)
        picks = torch.rand(digits.shape, generator=generator) * self.counts[digits]
        pictures = self.pictures[self.starts[digits] + picks.long()]
        canvases = torch.cat(pictures.unbind(1), dim=2)
        return canvases[:, None] / 127.5 - 1.0


def flow_matching_loss(
    transformer: SD3Transformer2DModel,
    clean: Tensor,
    states: Tensor,
    pooled: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity ``noise - clean`` at uniformly drawn noise levels.

    Args:
        transformer: The velocity model; its timestep is 1000 times the noise level.
        clean: Latents ``[B, 1, 8, 16]``.
        states: Prompt token states ``[B, T, 64]``.
        pooled: Pooled prompt states ``[B, 64]``.
        generator: Source of all randomness.

    Returns:
        A scalar.
    """
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.rand(len(clean), generator=generator)
    level = sigma[:, None, None, None]
    velocity = transformer(
        hidden_states=(1 - level) * clean + level * noise,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=1000 * sigma,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - clean)


def pretrain(
    pipeline: StableDiffusion3Pipeline,
    settings: Pretraining,
    *,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Trains the pipeline's transformer in place, on wrongly labelled canvases among others.

    Args:
        pipeline: The pipeline; only its transformer changes.
        settings: How, and how far.
        seed: Fixes the batches.
        progress: Receives a line of text now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    book = DigitBook(*load_digits("train"))
    states, pooled = encode_prompts(pipeline, all_prompts())
    transformer = pipeline.transformer.train()
    average = torch.optim.swa_utils.AveragedModel(
        transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema_decay)
    )
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    for step in range(settings.steps):
        padded = step % settings.padded_every == 0
        batch_size = settings.batch_size // 4 if padded else settings.batch_size
        numbers = torch.randint(0, _EMPTY_PROMPT, (batch_size,), generator=generator)
        canvases = book.draw(numbers, settings.wrong_digit_rate, generator)
        clean = (canvases - SHIFT_FACTOR) * SCALING_FACTOR
        empty = torch.rand(len(numbers), generator=generator) < settings.empty_prompt_rate
        prompts = numbers.masked_fill(empty, _EMPTY_PROMPT)
        tokens = F.pad(states[prompts], (0, 0, 0, DEFAULT_PADDING if padded else 0))
        loss = flow_matching_loss(transformer, clean, tokens, pooled[prompts], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(transformer)
        if progress and (step + 1) % 100 == 0:
            progress(f"image model: step {step + 1}/{settings.steps}, loss {loss.item():.3f}")
    transformer.load_state_dict(average.module.state_dict())
    transformer.eval()
