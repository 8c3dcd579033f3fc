"""HPS: a CLIP model trained on people's preferences among generated pictures."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .clip_models import OpenClip
from .text import text_of


class ImageHps:
    """Score pictures by the Human Preference Score v2 or v2.1 (arXiv 2306.09341).

    It is the cosine of the embeddings of picture and prompt. As in the authors' package, the longer
    side is brought to size and the rest padded, so nothing is cut off.

    Range [-1, 1], higher is better; usual pictures have 0.2 to 0.4. Any picture has a score; long
    prompts are cut to 77 tokens. Costs a forward pass of ViT-H/14 (1 B parameters, 4 GB in float32)
    per picture. The public weights are Apache-2.0.

    Args:
        path: ``HPS_v2.1_compressed.pt`` (or ``HPS_v2_compressed.pt``) of ``xswu/HPSv2``, or the
            same as safetensors.
        architecture: of open_clip, or a JSON file that describes one.
        device: where it runs; a GPU if there is one.
        batch_size: pictures per forward pass.

    Raises:
        ConfigError: no such file, or an unknown architecture.
        MissingExtraError: open_clip is not installed.
    """

    def __init__(
        self,
        path: str,
        architecture: str = "ViT-H-14",
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.model = OpenClip("image_hps", path, architecture, "longest", device, batch_size)

    def __call__(
        self, images: list[Image.Image], prompts: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        cosines = self.model.cosines(images, [text_of(prompt) for prompt in prompts])
        return list(cosines.tolist())
