"""The typed sections of a configuration: names and numbers only, never torch.

The classes here are what modalities share; ``token_schema`` and ``flow_schema`` have one class for
each, so that a key of another modality is an unknown key. The sentence under a field is its
documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from mmgrpo.config.paths import locate, locate_callable, locate_marked


def _in_base(find: Callable[[Any, Path | None], Any]) -> AfterValidator:
    """A validator that locates paths; the validation context is the configuration's folder."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        return find(value, info.context)

    return AfterValidator(validate)


LocatedPath = Annotated[str, _in_base(locate)]
LocatedCallable = Annotated[str, _in_base(locate_callable)]
LocatedOptions = Annotated[dict[str, Any], _in_base(locate_marked)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Method(Section):
    """A method preset, and the slots to change in it: ``{id: dapo, advantage: {scale: batch}}``."""

    model_config = ConfigDict(extra="allow")

    id: str = "grpo"
    """Preset id; `mmgrpo methods` lists them."""

    @property
    def overrides(self) -> dict[str, Any]:
        """Slot -> what changes in the preset."""
        return dict(self.model_extra or {})


class Reward(Section):
    """A reward by name, its weight in the sum and its own options."""

    name: LocatedCallable
    """A reward of ``mmgrpo.rewards``, ``package.module:function`` or ``file.py:function``."""
    weight: float = 1.0
    options: LocatedOptions = {}

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, value: Any) -> Any:
        """Accept a bare name, and options written beside name and weight."""
        if not isinstance(value, dict):
            return {"name": value}
        own = {key: value[key] for key in ("name", "weight") if key in value}
        explicit = value.get("options", {})
        if not isinstance(explicit, dict):
            return {**own, "options": explicit}
        beside = {k: v for k, v in value.items() if k not in ("name", "weight", "options")}
        return {**own, "options": {**explicit, **beside}}


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_method(value: Any) -> Any:
    return value if isinstance(value, dict) else {"id": value}


class Lora(Section):
    """Low-rank adapters; without this section every weight trains."""

    rank: PositiveInt = 32
    alpha: PositiveFloat = Field(default_factory=lambda data: 2.0 * data["rank"])
    """Scale of the update is alpha / rank; the default is twice the rank."""
    targets: list[str] | None = None
    """Names of the layers that get an adapter; null: the usual ones of the model's family."""


class Model(Section):
    """The model to train."""

    path: LocatedPath
    """A Hugging Face folder (or hub id)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: Lora | None = None
    reference: Literal["auto", "adapter_off", "copy", "ema", "none"] = "auto"
    """Where the reference comes from, if the method needs one; auto: adapter_off, else copy."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations twice and keep few; auto: where a micro-batch would not fit otherwise."""


class Data(Section):
    """The prompts: JSONL, Parquet or a datasets folder."""

    train: LocatedPath
    eval: LocatedPath | None = None
    prompt_column: str = "prompt"
    """Plain text, or chat messages."""


class Rollout(Section):
    """How samples are drawn."""

    group_size: PositiveInt = 8
    """Samples per prompt."""
    prompts_per_step: PositiveInt = 8


class Trainer(Section):
    """The update."""

    steps: PositiveInt
    """Rollout steps in all."""
    max_decisions: PositiveInt | None = None
    """Stop after the step in which so many decisions have been generated."""
    max_seconds: PositiveFloat | None = None
    """Stop after the step in which the steps have taken so long."""
    learning_rate: PositiveFloat
    minibatches: PositiveInt = 1
    """Optimiser steps per pass over a rollout."""
    epochs: PositiveInt = 1
    """Passes over a rollout."""
    micro_batch_size: PositiveInt | None = None
    """Samples per forward pass; null: the whole minibatch. Does not change the gradient."""
    max_grad_norm: PositiveFloat | None = 1.0
    weight_decay: NonNegativeFloat = 0.0
    betas: Annotated[list[Share], Len(2, 2)] = [0.9, 0.999]
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    ema_decay: Share | None = None
    """Keep an exponential average of the weights and evaluate with it."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints; null: only one at the end."""
    keep_checkpoints: PositiveInt = 2


class Speed(Section):
    """What makes a step cheaper and leaves its result the same, but for rounding."""

    micro_batch_decisions: PositiveInt | None = None
    """Decisions (tokens, denoising steps) per forward pass, padding included; null: any number."""
    skip_idle: bool = True
    """Leave samples out of the update that have no gradient."""
    overlap_rewards: bool | Literal["async"] = "async"
    """Call rewards on groups that are finished while others are still drawn or decoded; async: only
    async functions, which wait for something else, not for the cores that the engine computes on.
    """
    fast_layers: bool = True
    """Compute the float32 layers of a model on a CPU in fewer and faster steps."""
    keep_memory: bool = True
    """Keep up to 512 MiB of freed memory for the next step; only where the C library is glibc."""


class Eval(Section):
    """Evaluation on held-out prompts."""

    every: PositiveInt | None = None
    """Steps between evaluations; null: before the first and after the last."""
    prompts: PositiveInt | None = None
    """Use only the first prompts."""
    samples: PositiveInt = 1
    """Samples per prompt."""
    judge: Reward | None = None
    """Its mean is eval/success; null: the first reward."""


class Tracking(Section):
    """Where metrics go beside metrics.jsonl."""

    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []


class Config(Section):
    """What every modality shares."""

    modality: str
    method: Annotated[Method, BeforeValidator(_as_method)] = Method()
    seed: NonNegativeInt = 0
    run_dir: str
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run that run_dir holds."""
    model: Model
    data: Data
    rewards: Annotated[list[Reward], BeforeValidator(_as_list), Len(1)]
    reward_failure: Literal["stop", "drop"] = "stop"
    """What to do with a sample whose reward function fails."""
    reward_timeout_s: PositiveFloat | None = None
    rollout: Rollout
    trainer: Trainer
    speed: Speed = Speed()
    eval: Eval
    tracking: Tracking = Tracking()
