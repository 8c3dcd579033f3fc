"""Keep the libraries' progress bars and idle remarks out of a run's own output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

HARMLESS = (
    "requires torchvision (not installed); falling back",
    "of type <class 'NoneType'> cannot be saved",
    "Register the correct mapping in `AutoImageProcessor`",
    "Token indices sequence length is longer",
)
"""Remarks on parts that are not needed or not ours, and on prompts that we refuse ourselves."""
DEPRECATED_BY_PEFT = ".is_gradient_checkpointing. is deprecated"
"""An attribute of transformers that peft still reads."""


def silence(libraries: Iterable[str]) -> None:
    """Silence those of the given libraries that are installed; real warnings stay."""
    warnings.filterwarnings("ignore", DEPRECATED_BY_PEFT, FutureWarning)
    for library in libraries:
        if find_spec(library) is None:
            continue
        import_module(f"{library}.utils.logging").disable_progress_bar()
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in HARMLESS)
