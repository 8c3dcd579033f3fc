"""A tiny masked diffusion model: a real Llama that looks in both directions."""

import torch


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
