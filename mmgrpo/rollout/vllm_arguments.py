"""How vLLM is started, in this process or as a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmgrpo.errors import ConfigError

RECEIVER = "mmgrpo.rollout.vllm_worker.WeightReceiver"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for."""
GPU_SHARE = 0.4
CPU_BATCH_TOKENS = 16384
FIXED = ("model", "dtype", "logprobs_mode", "worker_extension_cls", "generation_config")
SERVER_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Switches on the routes through which the trainer sends weights."""


def check_one_process() -> None:
    """Refuse vLLM where several processes train: it would get the weights of each of them.

    Raises:
        ConfigError: how many there are.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise ConfigError(
            f"rollout.engine is vllm and there are {count} training processes; expected 1, or "
            "rollout.engine=native."
        )


def usual_options(*, beside_trainer: bool) -> dict[str, Any]:
    """Return what vLLM gets unless the user says otherwise.

    On a GPU that a trainer shares, vLLM takes ``GPU_SHARE`` of the memory and sleeps during
    updates. On a CPU it runs eagerly and reads prompts in one piece: when it reads one in parts, it
    sets back the generator of a seeded sample, which generators on CPUs cannot do.

    Args:
        beside_trainer: in the trainer's process.
    """
    import torch

    if not torch.cuda.is_available():
        return {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": CPU_BATCH_TOKENS,
        }
    if not beside_trainer:
        return {}
    return {"gpu_memory_utilization": GPU_SHARE, "enable_sleep_mode": True}


def engine_arguments(
    model: str,
    *,
    dtype: str,
    lora_rank: int | None,
    options: Mapping[str, Any],
    beside_trainer: bool = False,
) -> dict[str, Any]:
    """Return vLLM's arguments: what the weight synchronisation needs, then the user's.

    Args:
        model: model folder or hub id.
        dtype: dtype of the weights.
        lora_rank: rank of the adapter, None where all weights train.
        options: further arguments of vLLM, by name, which go before the usual ones.
        beside_trainer: see :func:`usual_options`.

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
    return {**usual_options(beside_trainer=beside_trainer), **arguments, **options}


def server_flags(arguments: Mapping[str, Any], *, host: str, port: int) -> list[str]:
    """Return the flags of vLLM's server for the arguments of :func:`engine_arguments`."""
    flags = ["--enable-scale-out"]  # the route that takes and returns tokens, not text
    for name, value in {**arguments, "host": host, "port": port}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            flags += [flag, str(value)]
    return flags
