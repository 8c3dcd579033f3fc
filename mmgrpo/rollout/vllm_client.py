"""vLLM as a server that `mmgrpo serve` started; weights pass through a folder that both see."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from mmgrpo.errors import ConfigError, MmgrpoError
from mmgrpo.rollout.vllm_arguments import check_one_process
from mmgrpo.rollout.vllm_local import check_prompt, write_adapter
from mmgrpo.rollout.vllm_session import Completion, TokenRequest
from mmgrpo.rollout.vllm_weights import WEIGHTS_FILE, Stamp, write_weights

CONNECTIONS = 64
TIMEOUT_S = 3600.0


class VllmClient:
    """A backend behind a URL; see :class:`~mmgrpo.rollout.vllm_session.Backend`.

    Every version of the weights is one folder with a safetensors file, which is removed when the
    workers have read the next one.
    """

    def __init__(self, url: str, *, folder: str | Path | None = None, sleeps: bool = False) -> None:
        """Find the server.

        Args:
            url: where it listens, such as ``http://127.0.0.1:8000``.
            folder: for the weights; on a disk that the server sees. None: a temporary folder,
                which will do where both run on one machine.
            sleeps: the server was started with ``enable_sleep_mode`` and shares the trainer's GPU.

        Raises:
            ConfigError: not a URL, or more than one training process.
            MmgrpoError: nothing answers there, or another server than `mmgrpo serve` starts.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"rollout.engine.url is '{url}'; expected http://host:port.")
        check_one_process()
        self._url = url.rstrip("/")
        self._sleeps = sleeps
        self._own = None if folder else tempfile.TemporaryDirectory(prefix="mmgrpo-weights-")
        self._folder = Path(self._own.name if self._own else folder or "").resolve()
        self._numbers = itertools.count(1)
        self._last: tuple[Path, str] | None = None
        self.stamps()

    def stamps(self) -> list[Stamp]:
        """What each of the server's workers holds."""
        answers = self._call("mmgrpo_stamp")
        return [Stamp(**answer) for answer in answers]

    def load(self, tensors: Mapping[str, Tensor], version: int, expected: str) -> None:
        """Write the weights, and let every worker read them."""
        folder = self._new_folder(version, expected)
        write_weights(folder / WEIGHTS_FILE, tensors)
        self._call("mmgrpo_load", str(folder), version, expected)
        self._post("/reset_mm_cache")
        self._post("/reset_encoder_cache")
        if not self._post("/reset_prefix_cache").get("success"):
            raise MmgrpoError(
                f"the vLLM server at {self._url} did not forget the prompts that it read with "
                "older weights: somebody else is using it."
            )
        self._replace(folder, "")

    def load_adapter(
        self, tensors: Mapping[str, Tensor], config: Any, version: int, expected: str
    ) -> None:
        """Write the adapter and load it under a new name, then remove the last one."""
        folder = self._new_folder(version, expected)
        write_adapter(folder, tensors, config)
        name = folder.name
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self._call("mmgrpo_adapter", str(folder), name, version, expected)
        self._replace(folder, name)

    def generate(
        self, requests: Sequence[TokenRequest], sampling: Mapping[str, Any], adapter: str
    ) -> list[list[Completion]]:
        """Sample all requests at the same time."""
        model = {"model": adapter} if adapter else {}

        def ask(request: TokenRequest) -> list[Completion]:
            images = [{"type": "image_url", "url": _data_url(image)} for image in request.images]
            answer = self._post(
                "/inference/v1/generate",
                {
                    **model,
                    **({"content_parts": images} if images else {}),
                    "token_ids": request.ids,
                    "sampling_params": {**sampling, "seed": request.seed},
                    "return_token_ids": True,
                },
            )
            check_prompt(request, answer["prompt_token_ids"])
            return [_completion(c) for c in sorted(answer["choices"], key=lambda c: c["index"])]

        with ThreadPoolExecutor(min(CONNECTIONS, len(requests))) as pool:
            return list(pool.map(ask, requests))

    def wake(self) -> None:
        """Take the memory back."""
        if self._sleeps:
            self._post("/wake_up")

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the memory to the trainer; weights that will be sent again are not kept."""
        if self._sleeps:
            if not keep_weights:
                self._call("mmgrpo_forget")
            self._post(f"/sleep?level={1 if keep_weights else 2}")

    def _new_folder(self, version: int, expected: str) -> Path:
        name = f"v{version}-{expected[:12]}-{os.getpid()}-{next(self._numbers)}"
        return self._folder / name

    def _replace(self, folder: Path, adapter: str) -> None:
        last, self._last = self._last, (folder, adapter)
        if last is not None:
            if last[1] and adapter:
                self._post("/v1/unload_lora_adapter", {"lora_name": last[1]}, missing_ok=True)
            shutil.rmtree(last[0], ignore_errors=True)

    def _call(self, method: str, *arguments: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._post(
            "/collective_rpc", {"method": method, "args": list(arguments)}
        )["results"]
        return found

    def _post(
        self, path: str, body: Mapping[str, Any] | None = None, *, missing_ok: bool = False
    ) -> dict[str, Any]:
        """Return the server's answer, {} where it is not a JSON object."""
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            self._url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
                text = response.read()
        except urllib.error.HTTPError as error:
            if error.code == 404 and missing_ok:
                return {}
            raise self._refused(path, error) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise MmgrpoError(
                f"the vLLM server at {self._url} does not answer ({reason}); start it with "
                "`mmgrpo serve CONFIG`, and run the same command again: training continues from "
                "its last checkpoint."
            ) from error
        try:
            answer = json.loads(text)
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}

    def _refused(self, path: str, error: urllib.error.HTTPError) -> MmgrpoError:
        detail = " ".join(error.read().decode(errors="replace").split())[:300]
        hint = " (was it started with `mmgrpo serve`?)" if error.code == 404 else ""
        return MmgrpoError(
            f"the vLLM server at {self._url} refuses {path.partition('?')[0]} with status "
            f"{error.code}{hint}: {detail}"
        )


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _completion(choice: Mapping[str, Any]) -> Completion:
    ids, content = choice["token_ids"], choice["logprobs"]["content"]
    if [entry["token_id"] for entry in content] != ids:
        raise MmgrpoError("vLLM's log-probabilities are not those of the tokens that it sampled.")
    return Completion(
        ids=list(ids),
        log_prob=[entry["logprob"] for entry in content],
        ended=choice["finish_reason"] == "stop",
    )
