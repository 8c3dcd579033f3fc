"""How vLLM is started, in this process or as a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmgrpo.errors import ConfigError

RECEIVER = "mmgrpo.rollout.vllm_worker.WeightReceiver"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for."""
FIXED = ("model", "dtype", "logprobs_mode", "worker_extension_cls", "generation_config")
SERVER_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Switches on the routes through which the trainer sends weights."""


def engine_arguments(
    model: str, *, dtype: str, lora_rank: int | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return vLLM's arguments: what the weight synchronisation needs, then the user's.

    Args:
        model: model folder or hub id.
        dtype: dtype of the weights.
        lora_rank: rank of the adapter, None where all weights train.
        options: further arguments of vLLM, by name.

    Raises:
        ConfigError: an option that is fixed here, or an adapter larger than vLLM holds.
    """
    for name in FIXED:
        if name in options:
            raise ConfigError(
                f"rollout.engine.options.{name} is given, and fixed by the rest of the "
                "configuration; remove it."
            )
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": RECEIVER,
        "generation_config": "vllm",
    }
    if lora_rank is not None:
        if lora_rank > LORA_RANKS[-1]:
            raise ConfigError(
                f"model.lora.rank is {lora_rank}, and vLLM holds adapters of at most rank "
                f"{LORA_RANKS[-1]}."
            )
        room = next(rank for rank in LORA_RANKS if rank >= lora_rank)
        arguments |= {"enable_lora": True, "max_lora_rank": room}
    return {**arguments, **options}


def server_flags(arguments: Mapping[str, Any], *, host: str, port: int) -> list[str]:
    """Return the flags of vLLM's server for the arguments of :func:`engine_arguments`."""
    flags = []
    for name, value in {**arguments, "host": host, "port": port}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            flags += [flag, str(value)]
    return flags
