"""What rewards with a CLIP model share: unit embeddings of pictures and texts, from local files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.errors import ConfigError, MissingExtraError, MissingResourceError, nearest

from .torchvision_shim import ensure_torchvision


class ClipModel:
    """A CLIP model that is loaded when first used; embeddings are float32 on the CPU.

    Args:
        device: where it runs; a GPU if there is one.
        batch_size: pictures or texts per forward pass.
    """

    def __init__(self, device: str | None, batch_size: int) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size
        self._parts: tuple[Any, Any, Any] | None = None

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        """The model and what prepares pictures and texts for it."""
        if self._parts is None:
            ensure_torchvision()
            model, prepare_images, prepare_texts = self._load()
            model = model.float().eval().requires_grad_(False).to(self.device)
            self._parts = (model, prepare_images, prepare_texts)
        return self._parts

    @property
    def scale(self) -> float:
        """The learned factor of the cosine, 100 at most."""
        return float(self.parts[0].logit_scale.detach().float().exp())

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return ``[B, D]`` unit embeddings of pictures."""
        return self._embed([image.convert("RGB") for image in images], self._encode_images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return ``[B, D]`` unit embeddings of texts; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        embedded = self._embed(unique, self._encode_texts)
        return embedded[[unique.index(text) for text in texts]]

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Return ``[B]``: the cosine of each picture with its text."""
        if len(images) != len(texts):
            raise ValueError(f"got {len(images)} pictures and {len(texts)} texts")
        return (self.images(images) * self.texts(texts)).sum(dim=-1)

    @torch.inference_mode()
    def _embed(self, items: Sequence[Any], encode: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        starts = range(0, len(items), self.batch_size)
        parts = [encode(items[start : start + self.batch_size]).float().cpu() for start in starts]
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def _load(self) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    def _encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        raise NotImplementedError

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        raise NotImplementedError


class HfClip(ClipModel):
    """A folder in the format of transformers.

    Args:
        reward: name of the reward, for errors.
        path: folder with ``config.json`` and ``model.safetensors`` of a ``CLIPModel``.
        processor: folder with its image processor and tokenizer; ``path`` if None.
        device: see :class:`ClipModel`.
        batch_size: see :class:`ClipModel`.

    Raises:
        ConfigError: a file is missing; it says which is expected where.
    """

    def __init__(
        self,
        reward: str,
        path: str,
        processor: str | None = None,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(device, batch_size)
        self.path, self.processor = path, processor or path
        weights = ("model.safetensors", "model.safetensors.index.json")
        check_files(reward, path, ("config.json",), weights)
        check_files(
            reward,
            self.processor,
            ("preprocessor_config.json", "processor_config.json"),
            ("tokenizer.json", "vocab.json"),
        )

    def _load(self) -> tuple[Any, Any, Any]:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model = CLIPModel.from_pretrained(self.path, use_safetensors=True)
        prepare = AutoImageProcessor.from_pretrained(self.processor)
        return model, prepare, AutoTokenizer.from_pretrained(self.processor)

    def _encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        model, prepare, _ = self.parts
        batch = prepare(images=list(images), return_tensors="pt").to(self.device)
        return _pooled(model.get_image_features(**batch))

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        model, _, tokenize = self.parts
        longest = model.config.text_config.max_position_embeddings
        batch = tokenize(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        names = ("input_ids", "attention_mask")
        return _pooled(model.get_text_features(**{name: batch[name] for name in names}))


class OpenClip(ClipModel):
    """A file of weights for an architecture of open_clip.

    Args:
        reward: name of the reward, for errors.
        path: weights, ``.safetensors`` or a checkpoint of plain tensors.
        architecture: a name that open_clip knows, or a ``.json`` file that describes one.
        resize: how pictures are brought to size: ``shortest``, ``longest`` or ``squash``; the
            architecture's own way if None.
        device: see :class:`ClipModel`.
        batch_size: see :class:`ClipModel`.

    Raises:
        ConfigError: no such file or architecture.
        MissingExtraError: open_clip is not installed.
    """

    def __init__(
        self,
        reward: str,
        path: str,
        architecture: str,
        resize: str | None = None,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(device, batch_size)
        if not Path(path).is_file():
            raise MissingResourceError(
                f"{reward}: '{path}' does not exist; expected a file with the weights of "
                f"open_clip's {architecture} (.safetensors, .pt or .bin)."
            )
        self.path, self.resize = path, resize
        self.architecture = _known_architecture(reward, architecture)

    def _load(self) -> tuple[Any, Any, Any]:
        import open_clip

        model, _, prepare = open_clip.create_model_and_transforms(
            self.architecture, pretrained=self.path, image_resize_mode=self.resize
        )
        return model, prepare, open_clip.get_tokenizer(self.architecture)

    def _encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        model, prepare, _ = self.parts
        pixels = torch.stack([prepare(image) for image in images])
        return model.encode_image(pixels.to(self.device))

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        model, _, tokenize = self.parts
        return model.encode_text(tokenize(list(texts)).to(self.device))


def check_files(reward: str, folder: str, *alternatives: Sequence[str]) -> None:
    """Raise ConfigError unless the folder has one file of each list of alternatives."""
    for names in alternatives:
        if not any(Path(folder, name).is_file() for name in names):
            raise MissingResourceError(f"{reward}: '{folder}' has no {' or '.join(names)}.")


def _pooled(output: Any) -> Tensor:
    """Which of the two get_*_features returns depends on the version of transformers."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _known_architecture(reward: str, architecture: str) -> str:
    if importlib.util.find_spec("open_clip") is None:
        raise MissingExtraError("open_clip_torch", "clip")
    ensure_torchvision()
    import open_clip

    if architecture.endswith(".json"):
        description = Path(architecture)
        if not description.is_file() or "embed_dim" not in json.loads(description.read_text()):
            raise ConfigError(
                f"{reward}: '{architecture}' is not a description of an architecture of open_clip "
                "(a JSON file with embed_dim, vision_cfg and text_cfg)."
            )
        open_clip.add_model_config(description)
        return description.stem
    if architecture not in open_clip.list_models():
        known = nearest(architecture, open_clip.list_models())
        raise ConfigError(f"{reward}: open_clip has no architecture '{architecture}'{known}")
    return architecture
