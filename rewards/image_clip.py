"""CLIP score: the cosine of a picture and its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from mmgrpo.errors import ConfigError

from .clip_models import ClipModel, HfClip, OpenClip
from .text import text_of


class ImageClip:
    """Score pictures by the cosine of their CLIP embedding and their prompt's (arXiv 2104.08718).

    Range [-1, 1], higher is better; pictures that fit their prompt have 0.2 to 0.4 with the public
    models. Neither clipped at 0 nor multiplied by 2.5 as in the paper, for gradients need neither.
    Any picture has a score; prompts longer than the model's context (77 tokens) are cut. Costs one
    forward pass of the image tower per picture and of the text tower per different prompt. OpenAI's
    weights and LAION's are MIT licensed.

    Args:
        path: a folder with a ``CLIPModel`` of transformers and its processor, such as a copy of
            ``openai/clip-vit-large-patch14``; or, with ``architecture``, a file of weights.
        architecture: of open_clip, such as ``ViT-H-14``, or a JSON file that describes one.
        device: where it runs; a GPU if there is one.
        batch_size: pictures per forward pass.

    Raises:
        ConfigError: a missing file, or an unknown architecture.
        MissingExtraError: open_clip is needed and not installed.
    """

    def __init__(
        self,
        path: str,
        architecture: str | None = None,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.model: ClipModel
        if architecture:
            self.model = OpenClip(
                "image_clip", path, architecture, device=device, batch_size=batch_size
            )
            return
        if Path(path).is_file():
            raise ConfigError(
                f"image_clip: '{path}' is a file: give its 'architecture', or a folder that "
                "transformers loads."
            )
        self.model = HfClip("image_clip", path, device=device, batch_size=batch_size)

    def __call__(
        self, images: list[Image.Image], prompts: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        cosines = self.model.cosines(images, [text_of(prompt) for prompt in prompts])
        return list(cosines.tolist())
