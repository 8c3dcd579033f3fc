"""The published LLaDA weights as an ordinary Llama folder, without running their remote code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from mmgrpo.errors import ModelError

OUTER = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
"""Names of layers in LLaDA's files -> names in a Llama of transformers; INNER those of a block."""
MASK_TOKEN = "<|mdm_mask|>"


def convert_llada(source: str | Path, target: str | Path) -> Path:
    """Write a ``LlamaForCausalLM`` folder from a local copy of ``GSAI-ML/LLaDA-8B-*``.

    LLaDA (arXiv:2502.09992) is a Llama without the causal mask: only names differ. Its published
    code is not run. File by file, so the memory of one file suffices.

    Args:
        source: folder with ``config.json``, the safetensors files and the tokenizer.
        target: folder to write; must not exist.

    Raises:
        ModelError: the folder is not a LLaDA of this kind, or the target exists.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ModelError(f"{target} exists; choose another folder.")
    files = sorted(source.glob("*.safetensors"))
    config = source / "config.json"
    if not files or not config.is_file():
        raise ModelError(f"{source} has no config.json and *.safetensors of a LLaDA model.")
    settings = llama_settings(json.loads(config.read_text(encoding="utf-8")))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    _convert_files(files, partial)
    _copy_tokenizer(source, partial)
    partial.replace(target)
    return target


def llama_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the Llama that a LLaDA is.

    Raises:
        ModelError: it has parts that a Llama lacks.
    """
    expected = {
        "block_type": "llama", "rope": True, "layer_norm_type": "rms", "activation_type": "silu",
        "include_bias": False, "include_qkv_bias": False, "weight_tying": False,
    }  # fmt: skip
    for key, value in expected.items():
        if given.get(key, value) != value:
            raise ModelError(f"LLaDA's {key} is {given[key]!r}; expected {value!r}.")
    heads = given["n_heads"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": given["embedding_size"],
        "hidden_size": given["d_model"],
        "intermediate_size": given["mlp_hidden_size"],
        "num_hidden_layers": given["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": given.get("n_kv_heads") or heads,
        "max_position_embeddings": given["max_sequence_length"],
        "rms_norm_eps": given.get("rms_norm_eps", 1e-5),
        "rope_theta": given.get("rope_theta", 1e4),
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "eos_token_id": given.get("eos_token_id"),
        "pad_token_id": given.get("pad_token_id"),
        "bos_token_id": None,
        "dtype": given.get("torch_dtype", "bfloat16"),
    }


def llama_name(name: str) -> str:
    """The name of a LLaDA tensor in a Llama.

    Raises:
        ModelError: it has none.
    """
    found = re.fullmatch(r"model\.transformer\.(?:blocks\.(\d+)\.)?(\w+)\.weight", name)
    block, layer = found.groups() if found else (None, "")
    wanted = (INNER if block else OUTER).get(layer)
    if wanted is None:
        raise ModelError(f"'{name}' is no tensor of a LLaDA model.")
    return f"model.layers.{block}.{wanted}.weight" if block else f"{wanted}.weight"


def _convert_files(files: list[Path], target: Path) -> None:
    from safetensors.torch import load_file, save_file

    index: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {llama_name(key): value for key, value in load_file(file).items()}
        save_file(tensors, target / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    document = {"metadata": {}, "weight_map": index}
    (target / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files and say which token the mask is."""
    for file in source.glob("*token*.json"):
        shutil.copyfile(file, target / file.name)
    settings = target / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    known.setdefault("mask_token", MASK_TOKEN)
    known.pop("auto_map", None)
    settings.write_text(json.dumps(known, indent=1), encoding="utf-8")
