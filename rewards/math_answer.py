"""Mathematical equality of answers, through math-verify."""

from __future__ import annotations

import re
import threading
from typing import Any

from math_verify import parse, verify

from .numeric_tolerance import single_number
from .text import as_number, find_answer, reference_of, text_of

MAX_ANSWER_CHARACTERS = 200
_ARITHMETIC = re.compile(
    r"[+*\u00d7\u00b7\u00f7^!]|\\(?:cdot|times|div|pm|sum|prod)|(?<=[\w)}])\s*-|\d\s+\d"
)
"""Signs of a calculation that was not carried out."""
_DIVISION = re.compile(r"/|\\d?frac|\\over")


def math_answer(
    completions: list[Any],
    answer: list[Any],
    *,
    extract: str = "any",
    expressions: bool = False,
    timeout_s: int = 2,
    **_columns: Any,
) -> list[float | None]:
    r"""Score 1 where the final answer equals the column ``answer`` as mathematics.

    The answer is the last ``<answer>`` tag, else the last ``\boxed{}``, else the last number; plain
    numbers are compared exactly, everything else by math-verify: 1/2 equals 0.5, sets and tuples
    compare by element. A reference without arithmetic asks for a result: an answer such as
    ``6*7``, which may only copy the question, does not score unless ``expressions`` is set.

    Range {0, 1}. No answer, one that cannot be parsed or compared in time, or one longer than 200
    characters scores 0. A row whose ``answer`` is null scores None; a reference that cannot be
    parsed raises ValueError.

    Args:
        completions: what the model wrote.
        answer: the references: numbers, LaTeX or text; of a worked solution, what follows the last
            ``####`` (as in GSM8K) or stands in the last ``\boxed{}``.
        extract: ``any``, or only ``answer``, ``boxed`` or ``number``.
        expressions: accept unevaluated arithmetic for a plain reference.
        timeout_s: limit of one comparison; it holds in the main thread only.
    """
    return [
        None if gold is None else _score(text_of(completion), gold, extract, expressions, timeout_s)
        for completion, gold in zip(completions, answer, strict=True)
    ]


# The score runner leaves the time limit to math-verify, which needs the main thread for it.
math_answer.keeps_time = True  # type: ignore[attr-defined]


def _score(text: str, gold: Any, extract: str, expressions: bool, timeout_s: int) -> float:
    reference = _bare(reference_of(gold))
    number = as_number(reference)
    symbolic = None if number is not None else _parse_gold(reference, timeout_s)
    found = _bare(find_answer(text, extract) or "")
    if not _may_be_parsed(found):
        return 0.0
    if not expressions and _is_unevaluated(found, reference):
        return 0.0
    if number is not None:
        same = single_number(found) == number
        if same or as_number(found) is not None or not re.search(r"\d", found):
            return float(same)
    return float(_equal(symbolic or _parse_gold(reference, timeout_s), found, timeout_s))


def _bare(text: str) -> str:
    """Without what may stand around an answer: white space, dollar signs, a final full stop."""
    return text.strip().strip("$").removesuffix(".").strip("$").strip()


def _may_be_parsed(found: str) -> bool:
    """Spares math-verify, which takes seconds on them, what a model writes when it fails."""
    opened, closed = (sum(map(found.count, brackets)) for brackets in ("([{", ")]}"))
    return 0 < len(found) <= MAX_ANSWER_CHARACTERS and opened == closed


def _is_unevaluated(found: str, reference: str) -> bool:
    if _ARITHMETIC.search(found) and not _ARITHMETIC.search(reference):
        return True
    whole = re.fullmatch(r"[-+]?[\d,]+", reference)
    return bool(whole and _DIVISION.search(found))


def _parse_gold(reference: str, timeout_s: int) -> list[Any]:
    parsed = _parse(reference, timeout_s)
    if not parsed:
        raise ValueError(f"the reference answer {reference!r} cannot be parsed")
    return parsed


def _parse(text: str, timeout_s: int) -> list[Any]:
    """The box makes math-verify read the whole text, not the last number in it."""
    return list(parse(rf"\boxed{{{text}}}", parsing_timeout=_limit(timeout_s)))


def _equal(gold: list[Any], found: str, timeout_s: int) -> bool:
    limit: Any = _limit(timeout_s)
    return bool(verify(gold, _parse(found, timeout_s), timeout_seconds=limit))


def _limit(timeout_s: int) -> Any:
    """math-verify keeps time with a signal, which only the main thread may set."""
    return timeout_s if threading.current_thread() is threading.main_thread() else None
