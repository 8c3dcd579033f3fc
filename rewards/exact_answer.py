"""Exact match of the tagged answer."""

from __future__ import annotations

import unicodedata
from typing import Any

from .text import last_tag, text_of


def exact_answer(
    completions: list[Any],
    answer: list[Any],
    *,
    tag: str | None = "answer",
    case_sensitive: bool = False,
    **_columns: Any,
) -> list[float | None]:
    """Score 1 where the text in the last ``<answer>`` tag is the column ``answer``.

    Both are compared after Unicode normalisation (NFKC), with white space collapsed, a final full
    stop removed and case folded.

    Range {0, 1}. Without a tag, or with an empty one, 0. A row whose ``answer`` is null scores
    None; an empty one raises ValueError.

    Args:
        completions: what the model wrote.
        answer: one reference per completion; numbers are compared as they are written.
        tag: name of the tag; null compares the whole completion.
        case_sensitive: keep case.
    """
    return [
        None if gold is None else _match(_found(text_of(completion), tag), gold, case_sensitive)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _found(text: str, tag: str | None) -> str | None:
    return text if tag is None else last_tag(text, tag)


def _match(found: str | None, gold: Any, case_sensitive: bool) -> float:
    reference = normalise(str(gold), case_sensitive)
    if not reference:
        raise ValueError("the reference answer is empty")
    return float(found is not None and normalise(found, case_sensitive) == reference)


def normalise(text: str, case_sensitive: bool = False) -> str:
    """Return the text in the form in which answers are compared.

    >>> normalise("  New   York. ")
    'new york'
    """
    text = " ".join(unicodedata.normalize("NFKC", text).split()).removesuffix(".").rstrip()
    return text if case_sensitive else text.casefold()
