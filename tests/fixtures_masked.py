"""A tiny masked diffusion model, a real Llama that looks in both directions, and runs on it."""

import json

import torch
from fixtures_runs import folder_document, merged


def tiny_masked(seed=0):
    """``(model, tokenizer)`` over letters, with a mask and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {letter: i for i, letter in enumerate("abcdefgh")}
    vocab = {**words, "<eos>": 8, "<pad>": 9, "<mask>": 10}
    core = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", mask_token="<mask>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        eos_token_id=8, pad_token_id=9, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model, tokenizer


PAIRS = ("ab", "cd", "ea", "fh", "gc", "bb")


def write_masked(folder):
    """Write a model folder and its data."""
    model, tokenizer = tiny_masked()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"prompt": pair, "answer": pair[0]}) + "\n" for pair in PAIRS]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "eval.jsonl").write_text("".join(rows[:2]))
    return folder


def masked_document(folder, run_dir, **changes):
    """A configuration as a mapping; ``changes`` are sections to update or keys to set."""
    base = folder_document(folder, run_dir, "masked_text", "grpo", "spread", max_new_tokens=4)
    return merged(base, changes)
