"""The vision playground's untrained model and processor: a Qwen2-VL of half a million weights."""

from __future__ import annotations

from transformers import (
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmgrpo.playground.scenes import PATCH, SMALL_CANVAS, WIDE_CANVAS
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.playground.untrained import untrained


def build_processor() -> PaddleOCRVLProcessor:
    """Makes the processor: Qwen2-VL's image processor and the byte-level tokenizer.

    Qwen2-VL's own processor class insists on a video processor, which needs torchvision.
    PaddleOCR-VL's class does the same to images and text (the same patches, grids, placeholder
    counts and token types) without video, so the folder loads with torch and Pillow alone.
    """
    tokenizer = build_tokenizer(images=True)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={
            "shortest_edge": SMALL_CANVAS[0] * SMALL_CANVAS[1],
            "longest_edge": 2 * WIDE_CANVAS[0] * WIDE_CANVAS[1],
        },
        image_mean=[0.13] * 3,
        image_std=[0.3] * 3,
    )
    return PaddleOCRVLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """The language half: two layers; a short rotary base resolves neighbouring image columns."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision_config() -> dict[str, object]:
    """The vision tower: three layers over 4x4 patches, four patches merged into one token."""
    return {
        "depth": 3,
        "embed_dim": 64,
        "num_heads": 4,
        "mlp_ratio": 4,
        "hidden_size": 128,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10.0},
    }


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2VLForConditionalGeneration:
    """Makes an untrained Qwen2-VL of about 0.6 million parameters."""

    def token_id(token: str) -> int:
        return int(tokenizer.get_vocab()[token])

    config = Qwen2VLConfig(
        text_config=_text_config(tokenizer),
        vision_config=_vision_config(),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return untrained(Qwen2VLForConditionalGeneration, config, tokenizer, seed)
