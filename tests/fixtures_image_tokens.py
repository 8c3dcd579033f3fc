"""A tiny random image-token model: 2 x 3 codes, of the real classes, built without any download."""

from __future__ import annotations

import torch
from fixtures_tokens import COMMON
from tokenizers import AddedToken

from mmgrpo.config.image_layout import FILE, ImageLayout
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.policies.image_tokens import Parts
from mmgrpo.protocols import Prompt

GRID, CODES = [2, 3], 10


def image_vocabulary(**changes):
    """A byte tokenizer with image codes at the end, and its layout."""
    tokenizer = build_tokenizer()
    names = ["<begin>", "<end>", "<plan>", *(f"<code {code}>" for code in range(CODES))]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    begin, end, plan, first = tokenizer.convert_tokens_to_ids(names[:4])
    options = {
        "grid": GRID, "code_offset": first, "num_codes": CODES, "begin_id": begin, "end_id": end,
        "plan_begin_id": plan, "question_format": "of {image}{question}=",
    }  # fmt: skip
    return tokenizer, ImageLayout(**{**options, **changes})


def tiny_vq(codes=CODES, seed=0):
    """A VQModel that makes 4 x 6 pixels of 2 x 3 codes."""
    from diffusers import VQModel

    torch.manual_seed(seed)
    vq = VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=codes,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    return vq


def tiny_parts(seed=0, **changes):
    """The parts of a policy of 30 thousand weights; ``changes`` are of the layout."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer, layout = image_vocabulary(**changes)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer) + 3, **COMMON, **ids)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():  # a default initialisation draws almost uniformly, and hides mistakes
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
        model.lm_head.weight.mul_(3.0)
        model.lm_head.weight[layout.begin_id] *= -4.0  # so that some plans end by themselves
    return Parts(model, tokenizer, layout, tiny_vq())


def save_parts(parts, folder):
    """Write a model folder."""
    parts.model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    parts.decoder.save_pretrained(folder / "vq")
    (folder / FILE).write_text(parts.layout.model_dump_json())
    return folder


def drawing_prompts():
    """Prompts of different lengths, with one and two questions."""
    return [
        Prompt(4, "a cat", columns={"questions": [["what", "cat"], ["how many", "1"]]}),
        Prompt(9, "two red dogs", columns={"questions": [["colour", "red"]]}),
    ]
