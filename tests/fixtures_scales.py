"""A tiny random next-scale generator, and runs on it, built without any download."""

from __future__ import annotations

import json

import torch
from fixtures_runs import folder_document, merged

from mmgrpo.config.scale_shape import ScaleShape
from mmgrpo.policies.scale_model import ScaleModel
from mmgrpo.protocols import Prompt

TINY = {
    "scales": [[1, 1], [1, 2], [2, 3]],
    "num_codes": 5,
    "code_dim": 4,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "max_prompt_bytes": 12,
    "decoder_width": 4,
}
"""Nine codes; pictures of 4 x 6 pixels."""
PROMPTS = [Prompt(3, "a cat"), Prompt(8, "two dogs")]
NAMES = ("cat", "dog", "red cat", "two cats", "a", "bird")


def tiny_scales(seed=0, **changes):
    """A model whose distributions are far from uniform; ``changes`` are of the shape."""
    torch.manual_seed(seed)
    model = ScaleModel.make(ScaleShape(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
        for block in model.transformer.blocks:
            block.offset.add_(0.1 * torch.randn_like(block.offset))
    return model


def write_scales(folder):
    """Write a model folder and its data."""
    tiny_scales().save_pretrained(folder / "model")
    rows = [json.dumps({"prompt": name}) + "\n" for name in NAMES]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "eval.jsonl").write_text("".join(rows[:2]))
    return folder


def scales_document(folder, run_dir, **changes):
    """A configuration as a mapping; ``changes`` are sections to update or keys to set."""
    base = folder_document(folder, run_dir, "image_scales", "var-grpo", "brightness")
    return merged(base, changes)
