"""Janus (arXiv:2410.13848): pictures through an embedding and a head of their own.

Here its text tokens and its image codes are one vocabulary, as other image-token models have it:
code c is token id V + c, V being the number of text tokens. The modules keep their names, so what
is saved is a plain Janus folder.

Shapes: B rows of T tokens, N positions, D hidden features, C codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from mmgrpo.config.image_layout import FILE, ImageLayout
from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.policies.image_decoder import BATCH, to_images
from mmgrpo.policies.image_questions import AnsweringView
from mmgrpo.policies.image_tokens import ImageTokenPolicy, Parts
from mmgrpo.policies.loading import load_model, load_tokenizer
from mmgrpo.policies.token_logits import Head

PROMPT_FORMAT = "<|User|>: {prompt}\n\n<|Assistant|>:"
"""How the Janus-Pro models were asked for pictures."""
MARKERS = {"begin_id": "<begin_of_image>", "end_id": "<end_of_image>"}
"""Field of the layout -> token of the published models."""


class CodeEmbedding(nn.Embedding):
    """A text embedding that hands ids from V on, as codes, to what embeds these."""

    def __init__(self, text: nn.Embedding, codes: Callable[[Tensor], Tensor]) -> None:
        super().__init__(1, 1)
        self.num_embeddings, self.embedding_dim = text.num_embeddings, text.embedding_dim
        self.weight, self.padding_idx = text.weight, text.padding_idx
        self._codes = codes  # a bound method: the modules belong to the model

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ``[..., T]`` ids below V + C as ``[..., T, D]``."""
        first = self.num_embeddings
        embedded = super().forward(ids.clamp(max=first - 1))
        drawn = self._codes((ids - first).clamp(min=0))
        return torch.where((ids >= first)[..., None], drawn, embedded)


class CodeHead(nn.Linear):
    """An output head whose text logits are followed by those of the codes."""

    def __init__(self, text: nn.Linear, codes: nn.Module) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = text.in_features, text.out_features
        self.weight = text.weight
        self._codes = codes.forward

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn ``[..., D]`` into ``[..., V + C]`` logits."""
        return torch.cat([super().forward(hidden), self._codes(hidden)], dim=-1)


class JanusPolicy(ImageTokenPolicy):
    """A ``JanusForConditionalGeneration`` of transformers that draws.

    The language model, the head and the generation modules train; the encoder that reads pictures
    and the decoder do not. It does not read pictures here, so it cannot be asked about them.
    """

    def _load(self, path: str | Path, *, dtype: str, attention: str) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText

        model = load_model(path, AutoModelForImageTextToText, dtype=dtype, attention=attention)
        return model, load_tokenizer(path)

    def _open_decoder(self, source: str | Path | Parts) -> Any:
        """None: the model has its own."""
        del source

    def _choose_trained(self, model: Any) -> Any:
        """Join the vocabularies, and freeze what does not draw; the language model is adapted."""
        inner = model.model
        _check_fit(self.layout, model.config)
        model.requires_grad_(False)
        drawing = ("language_model", "generation_embeddings", "generation_aligner")
        for part in (*(getattr(inner, name) for name in drawing), inner.generation_head):
            part.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
        text = model.get_input_embeddings()
        codes = model.prepare_embeddings_for_image_generation
        model.set_input_embeddings(CodeEmbedding(text, codes))
        model.set_output_embeddings(CodeHead(model.get_output_embeddings(), inner.generation_head))
        return inner.language_model

    @property
    def _size(self) -> int:
        return self.layout.code_offset + self.layout.num_codes

    def _code_head(self, head: nn.Module) -> Head | None:
        """The generation head alone."""
        del head
        return cast("Head", self.model.model.generation_head)

    @torch.no_grad()
    def draw(self, ids: Tensor) -> list[Image.Image]:
        """Return the pictures in complete samples ``ids [B, T]``."""
        decode = self.model.model.vqmodel.decode
        parts = self.grammar.codes(ids).split(BATCH)
        return [image for codes in parts for image in to_images(decode(codes))]

    def answering(self) -> AnsweringView:
        """Refuse: the model reads pictures through another encoder than the one it draws with.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "rollout.ask_questions: a Janus model reads pictures through another encoder, which is "
            "not connected here; expected a model that reads the codes it draws."
        )


def _check_fit(layout: ImageLayout, config: Any) -> None:
    """Refuse a layout that is not the model's.

    Raises:
        ModelError: what it says and what the model has.
    """
    wanted = _shape(config)
    for name, value in wanted.items():
        if getattr(layout, name) != value:
            raise ModelError(
                f"{FILE} says {name} {getattr(layout, name)}, and the model has {value}."
            )


def _shape(config: Any) -> dict[str, Any]:
    """What a model's configuration says of its pictures."""
    return {
        "grid": [config.vq_config.num_patches] * 2,
        "code_offset": config.get_text_config().vocab_size,
        "num_codes": config.vq_config.num_embeddings,
    }


def write_layout(folder: str | Path, *, prompt_format: str = PROMPT_FORMAT) -> ImageLayout:
    """Write ``image_tokens.json`` into a published Janus folder, which makes it ready to train.

    Args:
        folder: a local folder with the model and its tokenizer.
        prompt_format: how a prompt becomes what the model was trained with.

    Raises:
        ModelError: the tokenizer lacks a token that begins or ends a picture.
    """
    from transformers import AutoConfig

    tokenizer, ids = load_tokenizer(folder), {}
    for name, token in MARKERS.items():
        ids[name] = tokenizer.get_vocab().get(token)
        if ids[name] is None:
            raise ModelError(f"The tokenizer of {folder} has no token {token}.")
    shape = _shape(AutoConfig.from_pretrained(folder))
    layout = ImageLayout(**shape, **ids, prompt_format=prompt_format)
    layout.write(folder)
    return layout
