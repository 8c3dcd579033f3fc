"""vLLM in the trainer's process: one worker, which shares the trainer's device."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmgrpo.errors import ConfigError, MissingExtraError, MmgrpoError
from mmgrpo.rollout.vllm_arguments import check_one_process, engine_arguments
from mmgrpo.rollout.vllm_session import Completion, TokenRequest
from mmgrpo.rollout.vllm_weights import ADAPTER_FILE, Stamp, write_weights


class LocalVllm:
    """A backend in this process; see :class:`~mmgrpo.rollout.vllm_session.Backend`."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        lora_rank: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: model folder or hub id.
            dtype: dtype of the weights.
            lora_rank: rank of the adapter, None where all weights train.
            options: further arguments of vLLM, by name.

        Raises:
            ConfigError: more than one worker or trainer, or an option that is fixed.
            MissingExtraError: vLLM is not installed.
        """
        check_one_process()
        arguments = engine_arguments(
            model, dtype=dtype, lora_rank=lora_rank, options=options or {}, beside_trainer=True
        )
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if arguments.get(name, 1) != 1:
                raise ConfigError(
                    f"rollout.engine.options.{name} is {arguments[name]}, and vLLM in the "
                    "trainer's process has one worker; start a server (`mmgrpo serve`) and set "
                    "rollout.engine.url."
                )
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        self._llm = LLM(**arguments)
        self._sleeps = bool(arguments.get("enable_sleep_mode"))
        self._folder = tempfile.TemporaryDirectory(prefix="mmgrpo-adapter-")
        self._numbers = itertools.count(1)
        self._adapter: Any = None

    def stamps(self) -> list[Stamp]:
        """What the worker holds."""
        return [Stamp(**answer) for answer in self._llm.collective_rpc("mmgrpo_stamp")]

    def load(self, tensors: Mapping[str, Tensor], version: int, expected: str) -> None:
        """Replace all weights in place; the tensors are passed as they are."""
        self._llm.collective_rpc("mmgrpo_load", args=(dict(tensors), version, expected))
        engine = self._llm.llm_engine
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise MmgrpoError("vLLM did not forget the prompts that it read with older weights.")

    def load_adapter(
        self, tensors: Mapping[str, Tensor], config: Any, version: int, expected: str
    ) -> None:
        """Load an adapter under a new name, then remove the last one."""
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        folder = Path(self._folder.name) / str(number)
        write_adapter(folder, tensors, config)
        request = LoRARequest(f"{expected[:12]}-{number}", number, str(folder))
        self._llm.llm_engine.add_lora(request)
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = request
        self._llm.collective_rpc(
            "mmgrpo_adapter", args=(str(folder), request.lora_name, version, expected)
        )

    def generate(
        self, requests: Sequence[TokenRequest], sampling: Mapping[str, Any], adapter: str
    ) -> list[list[Completion]]:
        """Sample all requests together."""
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [_prompt(request) for request in requests],
            [SamplingParams(**sampling, seed=request.seed) for request in requests],
            use_tqdm=False,
            lora_request=self._adapter if adapter else None,
        )
        for request, output in zip(requests, outputs, strict=True):
            check_prompt(request, output.prompt_token_ids)
        return [[_completion(choice) for choice in output.outputs] for output in outputs]

    def wake(self) -> None:
        """Take the memory back."""
        if self._sleeps:
            self._llm.wake_up()

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the memory to the trainer; weights that will be sent again are not kept."""
        if self._sleeps:
            if not keep_weights:
                self._llm.collective_rpc("mmgrpo_forget")
            self._llm.sleep(level=1 if keep_weights else 2)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Any) -> None:
    """Write an adapter as peft does."""
    write_weights(folder / ADAPTER_FILE, tensors)
    config.save_pretrained(str(folder))


def check_prompt(request: TokenRequest, found: Sequence[int] | None) -> None:
    """Refuse a prompt that vLLM reads as other tokens than the policy.

    Raises:
        MmgrpoError: how long it is for either.
    """
    if list(found or ()) != request.expected:
        raise MmgrpoError(
            f"vLLM reads a prompt of {len(request.expected)} tokens as other {len(found or ())} "
            "tokens: its processor handles images differently; use rollout.engine=native."
        )


def _prompt(request: TokenRequest) -> dict[str, Any]:
    images = {"multi_modal_data": {"image": list(request.images)}} if request.images else {}
    return {"prompt_token_ids": request.ids, **images}


def _completion(choice: Any) -> Completion:
    pairs = zip(choice.token_ids, choice.logprobs, strict=True)
    return Completion(
        ids=list(choice.token_ids),
        log_prob=[found[token].logprob for token, found in pairs],
        ended=choice.finish_reason == "stop",
    )
