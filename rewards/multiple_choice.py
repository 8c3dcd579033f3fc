"""Multiple-choice questions answered by a letter."""

from __future__ import annotations

import re
from typing import Any

from .text import last_boxed, last_tag, text_of

LETTERS = "ABCDEFGHIJ"
_LEADING = re.compile(r"\W*([A-Z])(?:\W*$|[.):\]*])", re.IGNORECASE)
_SAID = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:)?\s*[(\[*]*([A-Z])\b(?!')", re.IGNORECASE)
_ALONE = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")


def multiple_choice(
    completions: list[Any], answer: list[Any], *, choices: str = LETTERS, **_columns: Any
) -> list[float | None]:
    r"""Score 1 where the chosen letter is the column ``answer``.

    The letter is read from the last ``<answer>`` tag, else the last ``\boxed{}``, else the last
    "answer is B" (or option, choice), else the start of the text. A tag or box must start with the
    letter (``B``, ``(b)``, ``B. Paris``) or hold only one capital letter that stands alone.

    Range {0, 1}. Without a letter, 0. A row whose ``answer`` is null scores None; one that is
    neither a letter of ``choices`` nor an index into it raises ValueError.

    Args:
        completions: what the model wrote.
        answer: the right letter, or its index counted from 0.
        choices: the letters that may be chosen.
    """
    return [
        None if gold is None else float(_chosen(text_of(completion)) == _letter(gold, choices))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _letter(gold: Any, choices: str) -> str:
    if isinstance(gold, int) and 0 <= gold < len(choices):
        return choices[gold]
    letter = str(gold).strip().strip("().").upper()
    if len(letter) != 1 or letter not in choices:
        raise ValueError(f"the reference answer {gold!r} is neither one of {choices} nor an index")
    return letter


def _chosen(text: str) -> str | None:
    marked = last_tag(text)
    marked = last_boxed(text) if marked is None else marked
    said = _SAID.findall(text) if marked is None else []
    if said:
        return str(said[-1]).upper()
    leading = _LEADING.match(text if marked is None else marked)
    if leading:
        return leading.group(1).upper()
    alone = set(_ALONE.findall(marked or ""))
    return alone.pop() if len(alone) == 1 else None
