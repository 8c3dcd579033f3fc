"""Vision-language policies: what images add to a text policy.

Only the interface that transformers' image-text-to-text models share is used: a processor that
turns text and images into inputs, and, where positions are multi-dimensional (M-RoPE), the model's
own ``get_rope_index``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgrpo.errors import DataError
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.decoding import text_positions
from mmgrpo.policies.loading import first_line, load_model, load_processor, save_processor
from mmgrpo.policies.token_payload import EncodedPrompt, TokenPrompts
from mmgrpo.protocols import Prompt

_PLACEHOLDERS = ("image", "video", "audio")
_TOKEN_TYPES = "mm_token_type_ids"


class VisionLanguagePolicy(AutoregressivePolicy):
    """A model that reads images and text and writes text.

    A prompt's images are processed once, and go through the vision tower once per evaluation,
    however many completions the prompt has (once per completion with gradient checkpointing, unless
    rows are packed).
    Placeholder tokens are never sampled.
    """

    modality = "vision"

    def __init__(
        self, source: str | Path | tuple[Any, Any], *, train_vision: bool = False, **options: Any
    ) -> None:
        """Load the model and choose what trains.

        Args:
            source: a model folder or hub id; or the model and its processor.
            train_vision: whether the vision tower and its projector train too.
            options: see :class:`AutoregressivePolicy`.
        """
        self._train_vision = train_vision
        self._frame: int | None = None  # tokens that the processor puts around each image
        super().__init__(source, **options)

    def _load(self, path: str | Path, *, dtype: str, attention: str) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText

        processor = load_processor(path)
        model = load_model(path, AutoModelForImageTextToText, dtype=dtype, attention=attention)
        return model, processor

    def _choose_trained(self, model: Any) -> Any:
        if self._train_vision:
            return model.requires_grad_(True)
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
        return model.get_decoder().requires_grad_(True)

    def _forbidden_ids(self, model: Any) -> tuple[int, ...]:
        """Return the ids of image, video and audio placeholders in the model's configuration."""
        names = [f"{kind}_token_{end}" for kind in _PLACEHOLDERS for end in ("id", "index")]
        found = [getattr(model.config, name, None) for name in names]
        return tuple(sorted({index for index in found if index is not None}))

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processing.tokenizer

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        _check_image_parts(prompt)
        text = self._render(prompt)
        try:
            encoded = self.processing(
                text=[text],
                images=list(prompt.images) or None,
                add_special_tokens=isinstance(prompt.content, str),
                return_tensors="pt",
            )
        except StopIteration:
            encoded = None
        except (IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{prompt.place}: the processor refuses it: {first_line(error)}"
            ) from error
        if encoded is None:
            raise DataError(
                f"{prompt.place}: the text has more image placeholders than the "
                f"{len(prompt.images)} images of the row."
            )
        return self._split(prompt, dict(encoded))

    def _count_tokens(self, prompt: Prompt) -> int:
        """Count without processing pixels, where the processor can tell from the images' sizes."""
        count = getattr(self.processing, "_get_num_multimodal_tokens", None)
        if count is None or not prompt.images:
            return super()._count_tokens(prompt)
        _check_image_parts(prompt)
        plain = isinstance(prompt.content, str)
        ids = self.tokenizer(self._render(prompt), add_special_tokens=plain)["input_ids"]
        sizes = [(image.height, image.width) for image in prompt.images]
        total = len(ids) - len(sizes) + sum(count(image_sizes=sizes).num_image_tokens)
        if self._frame is None:
            self._frame = (super()._count_tokens(prompt) - total) // len(sizes)
        return total + self._frame * len(sizes)

    def _split(self, prompt: Prompt, encoded: dict[str, Tensor]) -> EncodedPrompt:
        """Tell per-token inputs from image features, and check that their numbers agree."""
        ids = encoded.pop("input_ids")
        encoded.pop("attention_mask", None)
        aligned = {name: value[0] for name, value in encoded.items() if value.shape == ids.shape}
        features = {name: value for name, value in encoded.items() if name not in aligned}
        expected = self._image_tokens(features)
        found = int(torch.isin(ids, self._forbidden.to(ids.device)).sum())
        if expected is not None and found != expected:
            raise DataError(
                f"{prompt.place}: the prompt has {found} image tokens, and its "
                f"{len(prompt.images)} images make {expected} features; each image needs one "
                "placeholder in the text."
            )
        return EncodedPrompt(ids[0], aligned, features)

    def _image_tokens(self, features: dict[str, Tensor]) -> int | None:
        """Return how many tokens the images fill; None if the processor gives no grid."""
        if not features:
            return 0
        merge = getattr(self.processing.image_processor, "merge_size", None)
        if "image_grid_thw" not in features or merge is None:
            return None
        return int(features["image_grid_thw"].prod(dim=-1).sum()) // merge**2

    def _positions(self, prompts: TokenPrompts, inputs: dict[str, Tensor]) -> Tensor:
        """Return M-RoPE positions ``[axes, P, Lp]`` from the model itself, else ``[P, Lp]``."""
        base = self.model.base_model
        if not hasattr(base, "get_rope_index"):
            return text_positions(prompts.mask)
        blank = torch.zeros_like(prompts.ids, dtype=torch.int32)
        given = {
            "input_ids": prompts.ids,
            "attention_mask": prompts.mask.long(),
            _TOKEN_TYPES: blank,
            **inputs,
        }
        accepted = inspect.signature(base.get_rope_index).parameters
        return base.get_rope_index(**{k: v for k, v in given.items() if k in accepted})[0]

    def _save_processing(self, directory: Path) -> None:
        save_processor(self.processing, directory)


def _check_image_parts(prompt: Prompt) -> None:
    if isinstance(prompt.content, str):
        return
    contents = [message["content"] for message in prompt.content]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    count = sum(part.get("type") == "image" for part in parts)
    if count != len(prompt.images):
        raise DataError(
            f"{prompt.place}: the messages have {count} image parts and the row has "
            f"{len(prompt.images)} images."
        )
