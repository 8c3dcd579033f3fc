"""What rewards on text share: the text of a completion, and the answer inside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

MINUS = "\N{MINUS SIGN}"
NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}\b)?"
)
"""A number as people write it; a minus after a digit, letter or bracket is not its sign."""


def text_of(completion: Any) -> str:
    """Return the text of a completion or prompt: a string, or the joined texts of chat messages.

    >>> text_of([{"role": "assistant", "content": "4"}])
    '4'
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(_content_text(message["content"]) for message in completion)


def _content_text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def last_tag(text: str, tag: str = "answer") -> str | None:
    """Return what stands in the last ``<tag>...</tag>``, stripped; None without one.

    >>> last_tag("<answer>1</answer> no, <answer> 2 </answer>")
    '2'
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` with balanced braces; None without one.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    begin = start + len(r"\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None


def last_number(text: str) -> str | None:
    """Return the last number in the text as it is written; None without one.

    >>> last_number("3 apples and 1,200.5 pears.")
    '1,200.5'
    """
    found = NUMBER.findall(text.replace(MINUS, "-"))
    return found[-1] if found else None


def as_number(text: str) -> Fraction | None:
    """Return the exact value of a plain number (``-7``, ``1,200.5``, ``2e3``, ``3/4``), else None.

    >>> as_number("1,200.5")
    Fraction(2401, 2)
    """
    top, slash, bottom = text.strip().replace(MINUS, "-").partition("/")
    parts = [part.strip() for part in ((top, bottom) if slash else (top,))]
    if not all(NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part.replace(",", "")) for part in parts]
    if slash and values[1] == 0:
        return None
    return values[0] / values[1] if slash else values[0]


def find_answer(text: str, extract: str = "any") -> str | None:
    r"""Return the final answer in a text; None where there is none.

    Args:
        text: a completion.
        extract: ``answer`` (last ``<answer>`` tag), ``boxed`` (last ``\boxed{}``), ``number``
            (last number), or ``any``: the first of these that the text has.

    Raises:
        KeyError: another ``extract``.
    """
    for extractor in EXTRACTORS[extract]:
        answer = extractor(text)
        if answer is not None:
            return answer
    return None


def reference_of(gold: Any) -> str:
    r"""Return the final answer of a reference, which may be a worked solution.

    That is what follows the last ``####`` (GSM8K), else the last ``\boxed{}``, else everything.

    >>> reference_of("3 + 4 = 7\n#### 7")
    '7'
    """
    text = str(gold)
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed


EXTRACTORS: dict[str, tuple[Callable[[str], str | None], ...]] = {
    "answer": (last_tag,),
    "boxed": (last_boxed,),
    "number": (last_number,),
    "any": (last_tag, last_boxed, last_number),
}
