"""ImageReward: a BLIP model trained on which of several pictures people ranked higher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmgrpo.errors import ConfigError, nearest

from .clip_models import check_files
from .image_reward_weights import MAX_TOKENS, MEAN, STD, BlipScorer, load_scorer
from .text import text_of
from .torchvision_shim import ensure_torchvision

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


class ImageReward:
    """Score pictures by how people would rank them for their prompt (ImageReward, 2304.05977).

    BLIP's text encoder reads the prompt, looking at the picture in every layer; a head of five
    linear layers on its first token gives a number, brought to mean 0 and standard deviation 1 over
    the data that the model was made with.

    Range (-inf, inf), higher is better; usual pictures score -2 to 2. Any picture and any prompt
    have a score; prompts are cut after 35 tokens. Costs a forward pass of ViT-L/16 and of a BERT
    per picture (0.45 billion weights). The published weights are Apache-2.0.

    Args:
        path: folder with ``config.json``, ``model.safetensors`` and the tokenizer;
            :func:`mmgrpo.rewards.image_reward_weights.convert` makes it from ``ImageReward.pt``.
        dtype: ``float32`` or ``bfloat16``, in which the two encoders compute.
        device: where it runs; a GPU if there is one.
        batch_size: pictures per forward pass.

    Raises:
        ConfigError: a file is missing (it says which is expected where), or an unknown ``dtype``.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"image_reward: unknown dtype '{dtype}'{nearest(dtype, DTYPES)}")
        tokenizer = ("tokenizer.json", "vocab.txt")
        check_files("image_reward", path, ("config.json",), ("model.safetensors",), tokenizer)
        self.path, self.dtype = path, DTYPES[dtype]
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size
        self._parts: tuple[BlipScorer, Any, dict[str, Any]] | None = None

    def __call__(
        self, images: list[Image.Image], prompts: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        pairs = list(zip(images, map(text_of, prompts), strict=True))
        starts = range(0, len(pairs), self.batch_size)
        batches = [self._raw(pairs[start : start + self.batch_size]) for start in starts]
        _, _, described = self._loaded
        mean, std = described.get("mean", MEAN), described.get("std", STD)
        return [(raw - mean) / std for batch in batches for raw in batch.tolist()]

    @torch.inference_mode()
    def _raw(self, pairs: Sequence[tuple[Image.Image, str]]) -> Tensor:
        """``[B]`` float32 on the CPU."""
        network, tokenize, described = self._loaded
        side = network.vision.config.image_size
        pixels = torch.stack([prepared(image, side) for image, _ in pairs])
        words = tokenize(
            [text for _, text in pairs], padding="max_length", truncation=True,
            max_length=described.get("max_tokens", MAX_TOKENS), return_tensors="pt",
        ).to(self.device)  # fmt: skip
        pixels = pixels.to(self.device, self.dtype)
        scores: Tensor = network(pixels, words["input_ids"], words["attention_mask"])
        return scores.cpu()

    @property
    def _loaded(self) -> tuple[BlipScorer, Any, dict[str, Any]]:
        if self._parts is None:
            ensure_torchvision()
            from transformers import AutoTokenizer

            network, described = load_scorer(self.path, self.dtype)
            tokenizer = AutoTokenizer.from_pretrained(self.path)
            self._parts = (network.to(self.device), tokenizer, described)
        return self._parts


def prepared(image: Image.Image, side: int) -> Tensor:
    """Return ``[3, side, side]``: the shorter side resized, the middle cut out, normalised."""
    image = image.convert("RGB")
    width, height = image.size
    shorter = min(width, height)
    width, height = side * width // shorter, side * height // shorter
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
    return ((pixels - _PIXEL_MEAN) / _PIXEL_STD).permute(2, 0, 1)
