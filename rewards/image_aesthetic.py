"""LAION's aesthetic predictor: a linear head on CLIP embeddings of pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.errors import ConfigError, MissingResourceError

from .clip_models import HfClip

_LAYER = re.compile(r"(?:layers\.(\d+)\.)?(weight|bias)")


class ImageAesthetic:
    """Score pictures by how much people like their look, whatever the prompt (LAION-Aesthetics).

    The head is a chain of linear layers on the unit embedding; the public ones have five (v2,
    ``sac+logos+ava1-l14-linearMSE``) or one (v1, ``sa_0_4_vit_l_14_linear``), without
    non-linearities.

    Range (-inf, inf), higher is better; the heads were trained on marks from 1 to 10 and give usual
    pictures 4 to 7. Any picture has a score. Costs a forward pass of ViT-L/14 per picture. The
    public heads are Apache-2.0 (v2) and MIT (v1), OpenAI's CLIP is MIT.

    Args:
        path: the head's weights, ``.safetensors`` or the public ``.pth``.
        clip: folder with the ``CLIPModel`` and its processor that the head was trained on, a copy
            of ``openai/clip-vit-large-patch14``.
        device: where it runs; a GPU if there is one.
        batch_size: pictures per forward pass.

    Raises:
        ConfigError: a missing file, or weights that are not such a head.
    """

    def __init__(
        self, path: str, clip: str, device: str | None = None, batch_size: int = 64
    ) -> None:
        if not Path(path).is_file():
            raise MissingResourceError(
                f"image_aesthetic: '{path}' does not exist; expected a file with the head's "
                "weights (.safetensors or .pth)."
            )
        self.head = load_head(path)
        self.model = HfClip("image_aesthetic", clip, None, device, batch_size)

    def __call__(self, images: list[Image.Image], **_columns: Any) -> list[float | None]:
        """Score each picture; see the class."""
        features = self.model.images(images)
        for weight, bias in self.head:
            if weight.shape[1] != features.shape[1]:
                raise ConfigError(
                    f"image_aesthetic: the head takes {weight.shape[1]} features, the CLIP model "
                    f"has {features.shape[1]}."
                )
            features = features @ weight.T + bias
        return list(features.squeeze(1).tolist())


def load_head(path: str) -> list[tuple[Tensor, Tensor]]:
    """Return the layers' weights ``[out, in]`` and biases ``[out]``, in their order.

    Raises:
        ConfigError: the file has other tensors, or the layers do not end in one number.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _tensors(path).items():
        known = _LAYER.fullmatch(name)
        if known is None:
            raise ConfigError(
                f"image_aesthetic: '{path}' is not an aesthetic head: it has a tensor '{name}', "
                "expected 'weight' and 'bias' or 'layers.N.weight' and 'layers.N.bias'."
            )
        layers.setdefault(int(known[1] or 0), {})[known[2]] = tensor.float()
    whole = [layers[number] for number in sorted(layers)]
    if not whole or any(len(layer) < 2 for layer in whole) or len(whole[-1]["bias"]) != 1:
        raise ConfigError(f"image_aesthetic: the layers in '{path}' do not give one number.")
    return [(layer["weight"], layer["bias"]) for layer in whole]


def _tensors(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded
