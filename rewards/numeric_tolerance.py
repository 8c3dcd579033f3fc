"""Numbers that only need to be close."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from .text import MINUS, NUMBER, as_number, find_answer, reference_of, text_of


def numeric_tolerance(
    completions: list[Any],
    answer: list[Any],
    *,
    relative: float = 0.01,
    absolute: float = 0.0,
    extract: str = "any",
    **_columns: Any,
) -> list[float | None]:
    r"""Score 1 where the number in the answer is within tolerance of the column ``answer``.

    Close means ``|found - gold| <= max(relative * |gold|, absolute)``. The answer is looked for as
    :func:`~mmgrpo.rewards.text.find_answer` does; it must hold exactly one number, so listing
    several does not pay.

    Range {0, 1}. Without a single number, 0. A row whose ``answer`` is null scores None; one that
    is not a number raises ValueError.

    Args:
        completions: what the model wrote.
        answer: the reference numbers.
        relative: tolerance as a fraction of the reference.
        absolute: tolerance in the units of the reference.
        extract: ``any``, ``answer``, ``boxed`` or ``number``.
    """
    return [
        None if gold is None else _close(text_of(completion), gold, relative, absolute, extract)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _close(text: str, gold: Any, relative: float, absolute: float, extract: str) -> float:
    target = as_number(reference_of(gold))
    if target is None:
        raise ValueError(f"the reference answer {gold!r} is not a number")
    found = single_number(find_answer(text, extract) or "")
    if found is None:
        return 0.0
    return float(abs(found - target) <= max(Fraction(relative) * abs(target), Fraction(absolute)))


def single_number(text: str) -> Fraction | None:
    """Return the only number in a text, or the fraction that is all of the text; None otherwise.

    >>> single_number("about 12 m")
    Fraction(12, 1)
    """
    whole = as_number(text)
    numbers = NUMBER.findall(text.replace(MINUS, "-"))
    if whole is not None or len(numbers) != 1:
        return whole
    return as_number(numbers[0])
