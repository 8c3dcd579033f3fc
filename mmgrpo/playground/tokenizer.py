"""The playground's tokenizer: one token per byte, plus tags, roles and image markers."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# The names under which a processor looks for its placeholders on the tokenizer.
IMAGE_ATTRIBUTES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}

# Content is a string or a list of parts; each image part becomes one placeholder, which the
# processor stretches to the number of image tokens.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(*, images: bool = False) -> PreTrainedTokenizerFast:
    """Builds a byte-level tokenizer without merges, so that any text survives a round trip.

    The reasoning tags are single tokens but not *special* ones: decoding with
    ``skip_special_tokens`` keeps them, and a reward can look for them.

    Args:
        images: Whether to add the image and video markers of Qwen2-VL.

    Returns:
        A left-padding tokenizer with the chat template.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    markers = (*ROLE_TOKENS, *(IMAGE_TOKENS if images else ()))
    core.add_special_tokens([AddedToken(t, special=True) for t in (EOS_TOKEN, PAD_TOKEN, *markers)])
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAG_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens=dict(IMAGE_ATTRIBUTES) if images else {},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
