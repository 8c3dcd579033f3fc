"""Format of a tagged answer: thoughts first, then the answer, and nothing else."""

from __future__ import annotations

import re
from typing import Any

from .text import text_of


def tag_format(
    completions: list[Any],
    *,
    think: str = "think",
    answer: str = "answer",
    opened: bool = False,
    **_columns: Any,
) -> list[float | None]:
    """Score 1 where a completion is ``<think>...</think><answer>...</answer>``.

    Each tag must occur exactly once, the answer must not be blank, and only white space may stand
    around the two blocks. Source: the format reward of DeepSeek-R1 (arXiv 2501.12948).

    Range {0, 1}; anything else 0.

    Args:
        completions: what the model wrote.
        think: name of the first tag.
        answer: name of the second tag.
        opened: the chat template already wrote ``<think>``, so the completion starts inside it.
    """
    start = "" if opened else rf"\s*<{think}>"
    inner = rf"(?:(?!</?(?:{think}|{answer})>).)*"
    pattern = re.compile(
        rf"{start}{inner}</{think}>\s*<{answer}>(?!\s*</){inner}</{answer}>\s*", re.DOTALL
    )
    return [float(bool(pattern.fullmatch(text_of(completion)))) for completion in completions]
