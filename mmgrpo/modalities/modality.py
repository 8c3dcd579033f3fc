"""What a modality has to say about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmgrpo.config import Config
    from mmgrpo.methods import Method
    from mmgrpo.protocols import Policy, RolloutEngine


def _no_options(config: Any) -> dict[str, Any]:
    del config
    return {}


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Constructors and names of settings; the table ``MODALITIES`` of the registry lists them.

    Attributes:
        policy: ``(config, folder, reference)`` -> the policy, loaded from ``folder``.
        engine: ``(policy, config, method, mode)`` -> its rollout engine; ``mode`` is ``train``,
            ``eval`` or ``greedy``.
        libraries: packages whose start-up messages are silenced.
        length_limit: decisions of a sample at most, for aggregations that divide by it.
        prompt_options: what reading the data depends on beside the prompt column.
    """

    policy: Callable[[Any, str, str], Policy]
    engine: Callable[[Any, Any, Method, str], RolloutEngine]
    libraries: tuple[str, ...]
    length_limit: Callable[[Any], int]
    prompt_options: Callable[[Any], dict[str, Any]] = _no_options


def lora_options(config: Config) -> dict[str, Any] | None:
    """The adapter's settings, None where every weight trains."""
    return None if config.model.lora is None else config.model.lora.model_dump()
