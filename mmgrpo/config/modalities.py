"""Modality -> the class of its configurations."""

from __future__ import annotations

from mmgrpo.config.flow_schema import ImageConfig, VideoConfig
from mmgrpo.config.schema import Config
from mmgrpo.config.token_schema import (
    ImageScalesConfig,
    ImageTokensConfig,
    MaskedTextConfig,
    TextConfig,
    VisionConfig,
)

MODALITIES: dict[str, type[Config]] = {
    "text": TextConfig,
    "vision": VisionConfig,
    "image": ImageConfig,
    "video": VideoConfig,
    "image_tokens": ImageTokensConfig,
    "masked_text": MaskedTextConfig,
    "image_scales": ImageScalesConfig,
}
