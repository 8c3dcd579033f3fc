"""Every error a user can meet, and the exit code it ends the command line with.

MmgrpoError            1   something failed while running
  UsageError           2   the input is wrong; raised before anything is written
    ConfigError        2   a configuration key or value
    DataError          2   a data file, row or image
    MethodError        2   a method preset or one of its options
    ModelError         2   a model folder that is missing or does not fit
    MissingExtraError  2   an optional dependency that is not installed
  RewardError          1   a reward function raised, timed out or returned NaN
  Interrupted        130   Ctrl-C: the step was finished and saved
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmgrpoError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class UsageError(MmgrpoError):
    """The user's input cannot be used; the message names it, what was expected and what is near."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is wrong."""


class MissingResourceError(ConfigError):
    """Weights, a server or a program that the configuration names are not there (yet)."""


class DataError(UsageError):
    """A data file, one of its rows or an image cannot be used."""


class MethodError(UsageError):
    """A method preset or one of its options is wrong or does not fit the modality."""


class ModelError(UsageError):
    """A model folder is missing, incomplete or of the wrong kind."""


class MissingExtraError(UsageError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: install the extra with `pip install 'mmgrpo[{extra}]'`."
        )


class RewardError(MmgrpoError):
    """A reward function raised, timed out or returned NaN."""


class Interrupted(MmgrpoError):
    """The run was interrupted after a finished, saved step."""

    exit_code = 130


def nearest(name: str, choices: Iterable[str], *, limit: int = 12) -> str:
    """Return ``"; did you mean 'x'?"`` or the list of choices, to end an error message with."""
    options = sorted(map(str, choices))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = ", ".join(options[:limit]) + (", ..." if len(options) > limit else "")
    return f"; valid: {shown}."
