"""PickScore: a CLIP model trained on which of two pictures people picked."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .clip_models import HfClip
from .text import text_of

DIVISOR = 26.0
"""Brings the scores of usual pictures near 1: the convention of Flow-GRPO and its successors."""


class ImagePickscore:
    """Score pictures by PickScore (arXiv 2305.01569), divided by 26.

    With s the model's learned factor (100 in the public weights) and unit embeddings::

        s * cos(picture, prompt) / 26

    Differences of this are what the model's preferences are made of: the probability that people
    pick one of two pictures is the sigmoid of 26 times the difference. No softmax is taken, so a
    score does not depend on the other pictures.

    Range [-s / 26, s / 26], higher is better; usual pictures have 0.7 to 0.9. Any picture has a
    score; long prompts are cut to 77 tokens. Costs a forward pass of ViT-H/14 (1 B parameters, 4 GB
    in float32) per picture. The public weights are MIT licensed.

    Args:
        path: folder with the ``CLIPModel``, a copy of ``yuvalkirstain/PickScore_v1``.
        processor: folder with its processor, a copy of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``;
            ``path`` if it has one.
        device: where it runs; a GPU if there is one.
        batch_size: pictures per forward pass.

    Raises:
        ConfigError: a missing file.
    """

    def __init__(
        self,
        path: str,
        processor: str | None = None,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.model = HfClip("image_pickscore", path, processor, device, batch_size)

    def __call__(
        self, images: list[Image.Image], prompts: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        cosines = self.model.cosines(images, [text_of(prompt) for prompt in prompts])
        return list((self.model.scale * cosines / DIVISOR).tolist())
