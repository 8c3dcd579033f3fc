"""What a configuration must hold together before anything is loaded or written."""

from __future__ import annotations

from importlib.util import find_spec

from mmgrpo.config import Config
from mmgrpo.config.flow_schema import ImageRollout
from mmgrpo.errors import (
    ConfigError,
    DataError,
    MethodError,
    MissingExtraError,
    nearest,
)
from mmgrpo.methods import Method
from mmgrpo.protocols import Policy, Prompt


def check_method(method: Method, config: Config, world: int = 1) -> None:
    """Refuse a combination of method and run that makes no sense, in one sentence.

    Args:
        method: the method.
        config: the run.
        world: number of processes.

    Raises:
        MethodError: the method does not fit the group size, the number of updates per rollout or
            the absence of a reference. (Its modality is checked with the configuration.)
        ConfigError: the prompts of a step cannot be divided.
    """
    settings, group_size = config.trainer, config.rollout.group_size
    if "groups" in method.needs and group_size < 2:
        raise MethodError(
            f"method {method.id} compares the samples of a group, and rollout.group_size is "
            f"{group_size}: every advantage would be 0; use at least 2."
        )
    updates = settings.minibatches * settings.epochs
    if "on_policy" in method.needs and updates > 1:
        raise MethodError(
            f"method {method.id} has no importance ratio and takes one update per rollout; "
            f"trainer.minibatches x trainer.epochs is {updates}, expected 1."
        )
    if "one_epoch" in method.needs and settings.epochs > 1:
        raise MethodError(
            f"method {method.id} has no importance ratio and passes over a rollout once; "
            f"trainer.epochs is {settings.epochs}, expected 1."
        )
    if method.reads_reference and config.model.reference == "none":
        raise MethodError(
            f"method {method.id} is held to a reference and model.reference is 'none'; use 'auto', "
            "or switch the term off (regulariser.kl.coefficient=0, reward.kl=0)."
        )
    if isinstance(config.rollout, ImageRollout):
        method.check_rollout(num_steps=config.rollout.num_steps, group_size=group_size)
    _check_division(config, world)


def _check_division(config: Config, world: int) -> None:
    size, minibatches = config.rollout.prompts_per_step, config.trainer.minibatches
    if size % world:
        raise ConfigError(
            f"rollout.prompts_per_step is {size} and does not divide among {world} processes; "
            f"expected a multiple of {world}."
        )
    if minibatches > size:
        raise ConfigError(
            f"trainer.minibatches is {minibatches} and rollout.prompts_per_step {size}: "
            "a minibatch holds whole groups, so there can be at most one per prompt."
        )


def check_prompts(prompts: list[Prompt], config: Config) -> None:
    """Refuse a step that wants more prompts than there are, and rows without a wanted image.

    Raises:
        DataError: names the data and both numbers, or the row and the column.
    """
    if len(prompts) < config.rollout.prompts_per_step:
        raise DataError(
            f"{config.data.train}: {len(prompts)} rows, and rollout.prompts_per_step asks for "
            f"{config.rollout.prompts_per_step} different prompts."
        )
    for key in ("preferred_column", "rejected_column"):
        column: str | None = getattr(config.data, key, None)
        for prompt in prompts:
            if column is not None and prompt.columns.get(column) is None:
                raise DataError(
                    f"{prompt.place}: data.{key} is '{column}', and the row has no such image"
                    f"{nearest(column, prompt.columns)}"
                )


def check_trackers(config: Config) -> None:
    """Refuse a tracker whose package, which it is named after, is not installed.

    Raises:
        MissingExtraError: which one.
    """
    for name in config.tracking.trackers:
        if find_spec(name) is None:
            raise MissingExtraError(name, "tracking")


def check_reference(policy: Policy, method: Method) -> None:
    """Refuse a policy that was made without the reference its method needs.

    Raises:
        MethodError: says how to get one.
    """
    if method.reads_reference and not policy.has_reference:
        raise MethodError(
            f"method {method.id} is held to a reference and the policy has none; make it with "
            "reference='auto', or switch the term off (regulariser.kl.coefficient=0, reward.kl=0)."
        )
