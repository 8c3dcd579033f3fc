"""The network of ImageReward, and how the published weights become a folder that it loads.

The folder holds ``config.json`` (a ``BlipConfig`` of transformers, with the score's ``mean`` and
``std`` and the text's ``max_tokens`` beside it), ``model.safetensors`` (the names of
:class:`BlipScorer`) and the tokenizer's files, ``tokenizer.json`` or ``vocab.txt``. It is made
once, from ``ImageReward.pt`` and a folder with the tokenizer of ``bert-base-uncased``::

    from mmgrpo.rewards.image_reward_weights import convert

    convert("ImageReward.pt", "bert-base-uncased", "image-reward")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmgrpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import BlipConfig

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the published model's raw scores on its own data; ``score = (raw - MEAN) / STD``."""
MAX_TOKENS = 35
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_PLACES = (0, 2, 4, 6, 7)
"""Where the linear layers stand in the published head; between them stood dropout."""
HEAD_SIZE = 64
"""Width of an attention head, in both of BLIP's encoders."""

_BLOCK = r"blip\.visual_encoder\.blocks\.(\d+)\."
_LAYER = r"vision.encoder.layers.\1."
_RENAMED = (
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (_BLOCK + r"attn\.proj\.", _LAYER + "self_attn.projection."),
    (_BLOCK + r"attn\.", _LAYER + "self_attn."),
    (_BLOCK + r"norm(\d)\.", _LAYER + r"layer_norm\2."),
    (_BLOCK, _LAYER),
    (r"blip\.text_encoder\.", "text."),
    (r"mlp\.layers\.", "head."),
)
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")


class BlipScorer(nn.Module):
    """A BLIP text encoder that looks at the picture in every layer, and a head on its first token.

    Args:
        config: sizes of both encoders.
        widths: outputs of the head's layers; there is nothing between them but dropout in training.
    """

    def __init__(self, config: BlipConfig, widths: tuple[int, ...] = HEAD_WIDTHS) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        inputs = (config.text_config.hidden_size, *widths)
        self.head = nn.ModuleDict(
            {
                str(place): nn.Linear(inputs[number], inputs[number + 1])
                for number, place in enumerate(HEAD_PLACES[: len(widths)])
            }
        )

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return raw scores ``[B]`` float32; the head always computes in float32.

        Args:
            pixels: ``[B, 3, H, W]`` normalised.
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 1 where there is text.
        """
        seen = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device),
        ).last_hidden_state
        features = states[:, 0].float()
        for layer in self.head.values():
            features = layer(features)
        return features.squeeze(1)


def load_scorer(path: str, dtype: torch.dtype) -> tuple[BlipScorer, dict[str, Any]]:
    """Load a folder; the encoders get the dtype, the head stays float32.

    Returns:
        The network, for inference, and its ``config.json``.

    Raises:
        ConfigError: the weights do not fit the configuration.
    """
    from safetensors.torch import load_file
    from transformers import BlipConfig

    described = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    network = BlipScorer(BlipConfig.from_dict(described))
    try:
        network.load_state_dict(load_file(Path(path, "model.safetensors")))
    except RuntimeError as error:
        raise ConfigError(
            f"image_reward: '{path}/model.safetensors' does not fit its config.json: "
            f"{' '.join(str(error).split())[:300]}."
        ) from None
    network.vision.to(dtype)
    network.text.to(dtype)
    return network.eval().requires_grad_(False), described


def convert(checkpoint: str | Path, tokenizer: str | Path, out: str | Path) -> None:
    """Write the folder that the reward loads, from the published file; nothing is unpickled.

    Args:
        checkpoint: ``ImageReward.pt``: a file of plain tensors.
        tokenizer: folder with BERT's tokenizer.
        out: the folder to write; made if missing.

    Raises:
        ConfigError: the file has tensors that such a model lacks, or lacks some.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    loaded: dict[str, Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tensors = {_renamed(name): t for name, t in loaded.items() if not _UNUSED.match(name)}
    words = AutoTokenizer.from_pretrained(tokenizer)
    try:
        config = _described(tensors)
        with torch.device("meta"):
            expected = BlipScorer(config).state_dict()
    except KeyError as error:
        raise ConfigError(f"image_reward: '{checkpoint}' has no tensor for {error}.") from None
    for name in sorted(expected.keys() ^ tensors.keys()):
        what = "lacks" if name in expected else "has, beside those of ImageReward,"
        raise ConfigError(f"image_reward: '{checkpoint}' {what} the tensor '{name}'.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(folder)
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    described = config.to_dict() | {"mean": MEAN, "std": STD, "max_tokens": MAX_TOKENS}
    folder.joinpath("config.json").write_text(json.dumps(described, indent=2, default=str) + "\n")


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    raise ConfigError(f"image_reward: '{name}' is no tensor of ImageReward.")


def _described(tensors: Mapping[str, Tensor]) -> BlipConfig:
    """The sizes, as the tensors have them."""
    from transformers import BlipConfig

    patches = tensors["vision.embeddings.patch_embedding.weight"]
    places = tensors["vision.embeddings.position_embedding"].shape[1] - 1
    vocabulary, width = tensors["text.embeddings.word_embeddings.weight"].shape
    seen = patches.shape[0]
    vision = {
        "hidden_size": seen,
        "intermediate_size": len(tensors["vision.encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": _layers(tensors, r"vision\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, seen // HEAD_SIZE),
        "image_size": round(places**0.5) * patches.shape[-1],
        "patch_size": patches.shape[-1],
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": seen,
        "intermediate_size": len(tensors["text.encoder.layer.0.intermediate.dense.bias"]),
        "num_hidden_layers": _layers(tensors, r"text\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_SIZE),
        "max_position_embeddings": len(tensors["text.embeddings.position_embeddings.weight"]),
    }
    return BlipConfig(text_config=text, vision_config=vision)


def _layers(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))
