"""The Python door: ``mmgrpo.Trainer(policy=..., reward=..., data=..., method=...).train()``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgrpo import build
from mmgrpo.config import Config, load_config
from mmgrpo.config.modalities import MODALITIES
from mmgrpo.data import rows_to_prompts
from mmgrpo.errors import ConfigError, ModelError, nearest
from mmgrpo.protocols import Policy, Prompt
from mmgrpo.registry import load_target
from mmgrpo.scoring import load_rewards

MEMORY = "<in memory>"
"""Stands in a configuration for an object that was passed in instead of a path."""
DEFAULTS = {"steps": 100, "learning_rate": 1e-6}
"""What a configuration has to say and a script may leave out."""
SECTIONS = ("trainer", "rollout", "model", "data", "eval", "tracking")

RewardLike = str | Callable[..., Any] | Mapping[str, Any]
DataLike = str | Path | Sequence[Mapping[str, Any]]


class Trainer:
    """Train a policy with a method on prompts and rewards.

    Args:
        policy: a Hugging Face model or pipeline folder, or a :class:`~mmgrpo.protocols.Policy`.
        reward: a reward's name, a callable ``reward(prompts, completions, **columns)`` (for
            generators ``images`` in place of ``completions``), or a list of them.
        data: a data file or folder, or rows in memory (each a mapping with a ``prompt``).
        method: a preset id, or a mapping with ``id`` and the slots to change.
        eval_data: held-out prompts.
        **options: any configuration key, by its own name (``steps=100``, ``group_size=8``,
            ``learning_rate=1e-4``, ``run_dir="runs/mine"``) or by section
            (``eval={"every": 10}``). Without ``steps`` and ``learning_rate``: 100 and 1e-6.

    Raises:
        UsageError: something does not fit; raised before anything is written.
    """

    def __init__(
        self,
        policy: str | Path | Policy,
        reward: RewardLike | Sequence[RewardLike],
        data: DataLike,
        method: str | Mapping[str, Any] = "grpo",
        *,
        eval_data: DataLike | None = None,
        **options: Any,
    ) -> None:
        folder = isinstance(policy, str | Path)
        modality = options.pop("modality", None) or (
            infer_modality(Path(policy).expanduser()) if folder else policy.modality  # type: ignore[arg-type,union-attr]
        )
        rewards = _as_list(reward)
        document = {
            "modality": modality,
            "method": dict(method) if isinstance(method, Mapping) else method,
            "run_dir": "runs/mmgrpo",
            "model": {"path": str(policy) if folder else MEMORY},
            "data": {"train": _path(data), **({"eval": _path(eval_data)} if eval_data else {})},
            "rewards": [_spec(item) for item in rewards],
            "trainer": dict(DEFAULTS),
        }
        place_options(document, options)
        self.config: Config = load_config(document)
        named = zip(self.config.rewards, rewards, strict=True)
        specs = [{**spec.model_dump(), "name": _function(r) or spec.name} for spec, r in named]
        self.parts = build.assemble(
            self.config,
            policy=None if folder else policy,  # type: ignore[arg-type]
            prompts=self._prompts(data),
            eval_prompts=None if eval_data is None else self._prompts(eval_data),
            rewards=load_rewards(specs),
        )

    def train(self) -> dict[str, Any]:
        """Train to the end, or resume; return the last step's metrics."""
        return build.run(self.parts, self.config)

    def _prompts(self, data: DataLike) -> list[Prompt]:
        if isinstance(data, str | Path):
            return build.load_prompts(self.config, str(data))
        return rows_to_prompts(
            data,
            modality=self.config.modality,
            prompt_column=self.config.data.prompt_column,
            **build.modality_of(self.config).prompt_options(self.config),
        )


def place_options(document: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Put every option into its section of ``document``, in place.

    Raises:
        ConfigError: an unknown modality, or an option that no section has, with the nearest.
    """
    modality = document["modality"]
    if modality not in MODALITIES:
        raise ConfigError(f"unknown modality '{modality}'{nearest(modality, MODALITIES)}")
    schema = dict(MODALITIES[modality].model_fields)
    schema.pop("rewards")  # they are the argument ``reward``
    fields = {
        section: set(schema[section].annotation.model_fields)  # type: ignore[union-attr]
        for section in SECTIONS
    }
    for name, value in options.items():
        if name in SECTIONS and isinstance(value, Mapping):
            document[name] = {**document.get(name, {}), **value}
        elif name in schema:
            document[name] = value
        else:
            homes = [section for section in SECTIONS if name in fields[section]]
            if not homes:
                known = {"reward", *schema, *(n for names in fields.values() for n in names)}
                raise ConfigError(f"unknown option '{name}'{nearest(name, known)}")
            document.setdefault(homes[0], {})[name] = value


def infer_modality(folder: Path) -> str:
    """Tell from a model folder whether it is a text, vision, image or video model."""
    index = folder / "model_index.json"
    if index.is_file():
        family = load_target("mmgrpo.policies.flow_families:family_class")
        return str(family(json.loads(index.read_text())["_class_name"]).modality)
    if (folder / "image_tokens.json").is_file():
        return "image_tokens"
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has neither config.json nor model_index.json "
            "(for a hub id, pass modality='text', 'vision', 'image' or 'video')."
        )
    document = json.loads(config.read_text())
    if document.get("model_type") == "image_scales":
        return "image_scales"
    return "vision" if "vision_config" in document else "text"


def _as_list(reward: Any) -> list[Any]:
    return list(reward) if isinstance(reward, list | tuple) else [reward]


def _path(data: Any) -> str:
    return str(data) if isinstance(data, str | Path) else MEMORY


def _function(reward: RewardLike) -> Callable[..., Any] | None:
    """The reward's function, where it was given as one."""
    name = reward.get("name") if isinstance(reward, Mapping) else reward
    return name if callable(name) else None


def _spec(reward: RewardLike) -> dict[str, Any]:
    """The reward as a configuration has it: a function is represented by its name."""
    spec = dict(reward) if isinstance(reward, Mapping) else {"name": reward}
    function = _function(reward)
    if function is not None:
        spec["name"] = str(getattr(function, "__name__", type(function).__name__))
    return spec
