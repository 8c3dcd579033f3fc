"""One vLLM and the policy whose weights it holds; what is sampled, and how it is asked for.

Shapes: P prompts, G samples for each.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor

from mmgrpo.errors import MmgrpoError
from mmgrpo.rollout.vllm_weights import Stamp, adapter_weights, digest, model_weights


@dataclass(frozen=True)
class TokenRequest:
    """One prompt.

    Attributes:
        ids: its tokens, with one placeholder for each image.
        expected: its tokens as the policy reads them, with as many placeholders as features.
        images: its images.
        seed: names its samples.
    """

    ids: list[int]
    expected: list[int]
    images: tuple[Image, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sample: its tokens, their log-probabilities in nats, and whether it ended by itself."""

    ids: list[int]
    log_prob: list[float]
    ended: bool


class Backend(Protocol):
    """A vLLM, in this process or in another."""

    def stamps(self) -> list[Stamp]:
        """What each worker says that it holds."""
        ...

    def load(self, tensors: Mapping[str, Tensor], version: int, expected: str) -> None:
        """Replace all weights in place, and forget what was computed with the old ones."""
        ...

    def load_adapter(
        self, tensors: Mapping[str, Tensor], config: Any, version: int, expected: str
    ) -> None:
        """Load an adapter in place of the last one; ``config`` is peft's."""
        ...

    def generate(
        self, requests: Sequence[TokenRequest], sampling: Mapping[str, Any], adapter: str
    ) -> list[list[Completion]]:
        """Sample; ``sampling`` are fields of vLLM's ``SamplingParams``."""
        ...

    def wake(self) -> None:
        """Take the memory back that :meth:`sleep` gave."""
        ...

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the accelerator's memory to the trainer, if the engine can."""
        ...


class VllmSession:
    """Samples only with the policy's present weights, and proves it.

    Before sampling and after it, every worker is asked which weights it holds (a digest of all
    tensors, see :class:`~mmgrpo.rollout.vllm_worker.WeightReceiver`), so a server that was started
    again gets its weights again, and samples of other or half-loaded weights are never used.
    """

    def __init__(self, policy: Any, backend: Backend) -> None:
        self._policy = weakref.proxy(policy)  # sessions are kept by policy
        self._backend = backend
        self._has_adapter = hasattr(policy.network, "peft_config")

    def generate(
        self, requests: Sequence[TokenRequest], sampling: Mapping[str, Any], *, version: int
    ) -> list[list[Completion]]:
        """Wake, sample with the policy's present weights, and sleep.

        Raises:
            MmgrpoError: the workers hold other weights, before or afterwards.
        """
        self._backend.wake()
        stamp = self.synchronise(version)
        completions = self._backend.generate(requests, sampling, stamp.adapter)
        self._check(stamp.digest, "while it was sampling, vLLM's weights were changed")
        self._backend.sleep(keep_weights=self._has_adapter)
        return completions

    def synchronise(self, version: int) -> Stamp:
        """Give vLLM the policy's weights unless it has them; return the stamp of its workers.

        Raises:
            MmgrpoError: afterwards a worker does not hold them.
        """
        weights = self._weights()
        wanted = digest(weights)
        if not all(stamp.digest == wanted for stamp in self._backend.stamps()):
            if self._has_adapter:
                config = self._policy.network.peft_config["default"]
                self._backend.load_adapter(weights, config, version, wanted)
            else:
                self._backend.load(weights, version, wanted)
        return self._check(wanted, "vLLM could not be given the policy's weights")

    def _weights(self) -> dict[str, Tensor]:
        if self._has_adapter:
            return adapter_weights(self._policy.network)
        return model_weights(self._policy.model)

    def _check(self, wanted: str, what: str) -> Stamp:
        stamps = self._backend.stamps()
        other = [number for number, stamp in enumerate(stamps) if stamp.digest != wanted]
        if stamps and not other:
            return stamps[0]
        found = stamps[other[0]] if other else Stamp(error="no worker answered")
        held = f"version {found.version} ({found.digest[:12]})" if found.digest else "none"
        raise MmgrpoError(
            f"{what}: {len(other)} of {len(stamps)} workers hold other weights than {wanted[:12]}; "
            f"the first of them holds {held}{f' ({found.error})' if found.error else ''}."
        )
