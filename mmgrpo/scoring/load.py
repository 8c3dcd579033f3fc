"""From the name of a reward in a configuration to a function that is ready to be called."""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Any

from mmgrpo.errors import ConfigError, UsageError, nearest
from mmgrpo.scoring.locate import cause_of, locate

_TEXT_ARGUMENTS = frozenset({"prompts", "completions", "images", "lengths", "truncated"})
SAMPLE_ARGUMENTS: Mapping[str, frozenset[str]] = {
    "text": _TEXT_ARGUMENTS - {"images"},
    "vision": _TEXT_ARGUMENTS,
    "masked_text": _TEXT_ARGUMENTS - {"images"},
    "image": frozenset({"prompts", "images"}),
    "video": frozenset({"prompts", "videos"}),
    "image_tokens": frozenset({"prompts", "images", "self_answers"}),
    "image_scales": frozenset({"prompts", "images"}),
}
"""Modality -> what a reward is given about each sample, beside the data's columns."""

RESERVED = frozenset().union(*SAMPLE_ARGUMENTS.values())
"""Arguments that come from the sample; a data column of the same name is not passed on."""

_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class NamedReward:
    """A reward function with everything that calling it needs.

    Attributes:
        name: short name, for metrics.
        weight: factor in the combined reward; 0 only reports it.
        fn: called with keyword lists, one entry per sample; its options are bound.
        required_columns: columns that the data must have.
        required_arguments: which of the sample's own arguments it cannot do without.
        accepts: argument names it takes; None takes all (``**columns``).
        bound: names of its options, which no column may overwrite.
        keeps_time: it limits its own time and must stay in the calling thread.
        whole_batch: what it says of a group depends on the other groups of the call.
    """

    name: str
    weight: float
    fn: Callable[..., Any]
    required_columns: frozenset[str]
    required_arguments: frozenset[str] = frozenset()
    accepts: frozenset[str] | None = None
    bound: frozenset[str] = frozenset()
    keeps_time: bool = False
    whole_batch: bool = False

    def takes(self, argument: str) -> bool:
        """Whether the function is called with this argument."""
        return argument not in self.bound and (self.accepts is None or argument in self.accepts)


def load_reward(spec: str | Callable[..., Any] | Mapping[str, Any]) -> NamedReward:
    """Load one reward.

    Args:
        spec: a name, a callable, or a mapping with ``name`` and optionally ``weight`` (1) and
            ``options`` (none). A name is one of the package's own, ``"module:function"`` or
            ``"path/file.py:function"``; a class may stand for the function, and is constructed with
            the options.

    Raises:
        ConfigError: unknown name, file, function or option (the nearest is named), an option that
            is missing or refused, or a weight that is not a finite number.
    """
    name, weight, options = _fields(spec)
    target = name if callable(name) else locate(name)
    label = _label(name, target)
    _check_options(label, target, options)
    if inspect.isclass(target):
        fn, bound = _construct(label, target, options), frozenset[str]()
    else:
        bound_options = _keyword_defaults(target) | options
        fn, bound = functools.partial(target, **bound_options), frozenset(bound_options)
    named = {n: p for n, p in _parameters(label, fn).items() if n not in bound}
    required = {n for n, p in named.items() if p.kind in _NAMED and p.default is p.empty}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())
    return NamedReward(
        name=label,
        weight=weight,
        fn=fn,
        required_columns=frozenset(required - RESERVED),
        required_arguments=frozenset(required & RESERVED),
        accepts=None if takes_all else frozenset(n for n, p in named.items() if p.kind in _NAMED),
        bound=bound,
        keeps_time=bool(getattr(target, "keeps_time", False)),
        whole_batch=bool(getattr(target, "whole_batch", False)),
    )


def load_rewards(specs: Any) -> list[NamedReward]:
    """Load one reward or a list of them; a name that occurs again gets a number (``name_2``)."""
    several = isinstance(specs, Sequence) and not isinstance(specs, str)
    rewards: list[NamedReward] = []
    uses: Counter[str] = Counter()
    for spec in specs if several else [specs]:
        reward = load_reward(spec)
        uses[reward.name] += 1
        number = uses[reward.name]
        rewards.append(reward if number == 1 else replace(reward, name=f"{reward.name}_{number}"))
    return rewards


def check_modality(reward: NamedReward, modality: str) -> None:
    """Check that samples of a modality have what the reward looks at.

    Raises:
        ConfigError: names the reward, what it asks for and what there is.
    """
    there = SAMPLE_ARGUMENTS[modality]
    missing = sorted(reward.required_arguments - there)
    if missing:
        raise ConfigError(
            f"reward '{reward.name}' asks for {', '.join(missing)}; samples of modality "
            f"'{modality}' have {', '.join(sorted(there))}."
        )


def _fields(spec: Any) -> tuple[Any, float, dict[str, Any]]:
    if isinstance(spec, str) or callable(spec):
        return spec, 1.0, {}
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"a reward must be a name, a callable or a mapping; got {type(spec).__name__}."
        )
    for key in spec:
        if key not in ("name", "weight", "options"):
            raise ConfigError(
                f"reward: unknown key '{key}'{nearest(key, ('name', 'weight', 'options'))}"
            )
    name, weight = spec.get("name"), spec.get("weight", 1.0)
    if not (isinstance(name, str) and name) and not callable(name):
        raise ConfigError(f"reward: 'name' must be text; got {name!r}.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"reward '{name}': weight must be a finite number; got {weight!r}.")
    return name, float(weight), dict(spec.get("options") or {})


def _label(name: Any, target: Any) -> str:
    if isinstance(name, str):
        return name.rpartition(":")[2]
    return str(getattr(target, "__name__", type(target).__name__))


def _parameters(label: str, target: Any) -> Mapping[str, Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        raise ConfigError(f"reward '{label}': its parameters cannot be read.") from None


def _keyword_defaults(target: Any) -> dict[str, Any]:
    """Keyword-only parameters are options; binding their defaults keeps columns out of them."""
    parameters = inspect.signature(target).parameters.items()
    return {
        n: p.default for n, p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
    }


def _check_options(label: str, target: Any, options: Iterable[str]) -> None:
    parameters = _parameters(label, target)
    named = [n for n, p in parameters.items() if p.kind in _NAMED]
    if not inspect.isclass(target):
        named = [n for n in named if parameters[n].default is not Parameter.empty]
    for option in options:
        if option not in named or option in RESERVED:
            raise ConfigError(f"reward '{label}': unknown option '{option}'{_valid(option, named)}")


def _valid(option: str, named: Sequence[str]) -> str:
    return nearest(option, named) if named else "; it has no options."


def _construct(label: str, target: Any, options: dict[str, Any]) -> Any:
    missing = [
        n
        for n, p in _parameters(label, target).items()
        if p.kind in _NAMED and p.default is p.empty and n not in options
    ]
    if missing:
        raise ConfigError(f"reward '{label}': missing option '{missing[0]}'.")
    try:
        built = target(**options)
    except UsageError:
        raise
    except Exception as error:  # whatever the user's constructor raises
        raise ConfigError(f"reward '{label}': {cause_of(error)}.") from error
    if not callable(built):
        raise ConfigError(f"reward '{label}': class {target.__name__} has no __call__.")
    return built
