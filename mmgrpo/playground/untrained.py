"""Untrained models of transformers, whose weights one seed decides."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mmgrpo.playground.sft import plain_sampling

Model = TypeVar("Model", bound=PreTrainedModel)


def untrained(
    kind: type[Model], config: Any, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Model:
    """Makes a model that samples plainly; the caller's random state stays as it was.

    Args:
        kind: Class of the model.
        config: Its configuration.
        tokenizer: Whose end and padding tokens generation uses.
        seed: Decides the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.generation_config = plain_sampling(tokenizer)
    return model


def untrained_decoder(
    kind: type[Model],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    intermediate_size: int,
    num_key_value_heads: int,
    max_position_embeddings: int,
) -> Model:
    """Makes a language model of three layers, four heads and about 0.6 million parameters.

    Args:
        kind: A class such as ``Qwen2ForCausalLM``.
        tokenizer: Decides the vocabulary, which input and output embeddings share.
        seed: Decides the weights.
        intermediate_size: Width inside the feed-forward layers.
        num_key_value_heads: Heads of the keys and values.
        max_position_embeddings: Tokens of prompt and completion at most.
    """
    make_config: Any = kind.config_class
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return untrained(kind, config, tokenizer, seed)
