"""Whether the text that was asked for can be read in the picture, with tesseract."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from mmgrpo.errors import ConfigError, MissingResourceError, nearest

from .text import text_of

QUOTED = re.compile(
    r'"([^"]+)"|'
    r"\N{LEFT DOUBLE QUOTATION MARK}([^\N{RIGHT DOUBLE QUOTATION MARK}]+)"
)
BINARY = "tesseract"
_MIN_SIDE = 480
"""Pixels to which small pictures are enlarged: tesseract expects letters 20 to 30 pixels high."""


class ImageOcr:
    """Score pictures by how much the text read in them is like the text that was asked for.

    The text asked for is the column ``text``, or without such a column what stands in double quotes
    in the prompt (several quotations are joined by spaces). Both texts are compared without white
    space, after Unicode normalisation (NFKC) and case folding::

        whole       1 - edits / max(len(read), len(asked))
        contained   1 - edits to the best matching part of what is read / len(asked)
        edit        1 - min(edits, len(asked)) / len(asked), without edits if it is part of it
        substring   1 if what was asked for is part of what is read, else 0
        exact       1 if they are equal, else 0

    Range [0, 1], higher is better; a picture in which nothing is read scores 0. ``contained``,
    ``edit`` and ``substring`` forgive other text in the picture, and so can be gamed by much of it;
    ``edit`` is the text reward of Flow-GRPO (arXiv 2505.05470), with another reader. A row whose
    ``text`` is null scores None; a prompt without quotation where there is no column raises
    ValueError, and a tesseract that fails or exceeds its time raises too. Costs 0.1 to 0.5 s per
    picture and core. Tesseract is Apache-2.0.

    Args:
        match: ``whole``, ``contained``, ``edit``, ``substring`` or ``exact``.
        language: tesseract's language codes, such as ``eng`` or ``eng+deu``.
        layout: tesseract's page segmentation mode: 6 one block, 7 one line, 11 scattered text.
        case_sensitive: keep case.
        processes: pictures read at the same time; the number of cores if null.
        timeout_s: limit for one picture, in seconds.

    Raises:
        ConfigError: an unknown ``match``, or a language that is not installed.
        MissingResourceError: the program tesseract is not installed.
    """

    def __init__(
        self,
        match: str = "whole",
        language: str = "eng",
        layout: int = 6,
        case_sensitive: bool = False,
        processes: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        if match not in SIMILARITIES:
            raise ConfigError(f"image_ocr: unknown match '{match}'{nearest(match, SIMILARITIES)}")
        if not 0 <= layout <= 13:
            raise ConfigError(f"image_ocr: layout must be from 0 to 13; got {layout}.")
        self.binary = _find_binary()
        _check_languages(self.binary, language)
        self.similarity = SIMILARITIES[match]
        self.arguments = ["-l", language, "--psm", str(layout)]
        self.case_sensitive = case_sensitive
        self.processes = processes or os.cpu_count() or 1
        self.timeout_s = timeout_s

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[Any],
        text: list[str | None] | None = None,
        **_columns: Any,
    ) -> list[float | None]:
        """Score each picture; see the class."""
        asked = [quoted(prompt) for prompt in prompts] if text is None else text
        pairs = list(zip(images, asked, strict=True))
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(lambda pair: self._score(*pair), pairs))

    def _score(self, image: Image.Image, asked: str | None) -> float | None:
        if asked is None:
            return None
        wanted = comparable(asked, self.case_sensitive)
        if not wanted:
            raise ValueError("the text asked for is empty")
        return self.similarity(comparable(self.read(image), self.case_sensitive), wanted)

    def read(self, image: Image.Image) -> str:
        """Return the text that tesseract finds in the picture.

        Raises:
            RuntimeError: tesseract failed; what it said is quoted.
            TimeoutError: it took longer than the limit.
        """
        try:
            done = subprocess.run(
                [self.binary, "stdin", "stdout", *self.arguments],
                input=_as_png(image),
                capture_output=True,
                timeout=self.timeout_s,
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"tesseract took longer than {self.timeout_s:g} s") from None
        if done.returncode != 0:
            said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
            raise RuntimeError(f"tesseract failed with exit code {done.returncode}: {said}")
        return done.stdout.decode(errors="replace")


def quoted(prompt: Any) -> str:
    """Return what stands in double quotes in a prompt.

    Raises:
        ValueError: nothing does.

    >>> quoted('a shop sign that says "Open" and "24 hours"')
    'Open 24 hours'
    """
    text = text_of(prompt)
    found = [plain or typographic for plain, typographic in QUOTED.findall(text)]
    if not found:
        raise ValueError(
            f"the prompt {text[:80]!r} has no text in double quotes, and there is no column 'text'"
        )
    return " ".join(found)


def comparable(text: str, case_sensitive: bool = False) -> str:
    """Return a text without white space, in the form in which texts are compared."""
    text = "".join(unicodedata.normalize("NFKC", text).split())
    return text if case_sensitive else text.casefold()


def whole_similarity(read: str, asked: str) -> float:
    """1 minus the edit distance over the longer length."""
    return 1.0 - _edits(read, asked)[-1] / max(len(read), len(asked))


def contained_similarity(read: str, asked: str) -> float:
    """The same for the part of ``read`` that is most like ``asked`` (Sellers 1980)."""
    return 1.0 - min(_edits(asked, read, free_start=True)) / len(asked)


def edit_similarity(read: str, asked: str) -> float:
    """Flow-GRPO's: the same for all of ``read``, 1 where ``asked`` is in it, and never below 0."""
    edits = 0 if asked in read else _edits(read, asked)[-1]
    return 1.0 - min(edits, len(asked)) / len(asked)


def _edits(rows: str, columns: str, *, free_start: bool = False) -> list[int]:
    """The Levenshtein distances of ``rows`` to every beginning of ``columns``.

    With ``free_start``, to whatever ends there.
    """
    distances = [0] * (len(columns) + 1) if free_start else list(range(len(columns) + 1))
    for row, letter in enumerate(rows, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(columns, start=1):
            diagonal, distances[column] = (
                distances[column],
                min(distances[column] + 1, distances[column - 1] + 1, diagonal + (letter != other)),
            )
    return distances


SIMILARITIES: Mapping[str, Callable[[str, str], float]] = {
    "whole": whole_similarity,
    "contained": contained_similarity,
    "edit": edit_similarity,
    "substring": lambda read, asked: float(asked in read),
    "exact": lambda read, asked: float(read == asked),
}
"""From what was read and what was asked for, to a score."""


def _as_png(image: Image.Image) -> bytes:
    image = image.convert("L")
    factor = _MIN_SIDE / min(image.size)
    if factor > 1:
        size = (round(image.width * factor), round(image.height * factor))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _find_binary() -> str:
    path = shutil.which(BINARY)
    if path is None:
        raise MissingResourceError(
            "image_ocr: the program tesseract is not installed: `apt install tesseract-ocr` "
            "(Debian, Ubuntu) or `brew install tesseract` (macOS)."
        )
    return path


def _check_languages(binary: str, language: str) -> None:
    done = subprocess.run([binary, "--list-langs"], capture_output=True, text=True, check=False)
    installed = (done.stdout or done.stderr).split("\n")[1:]
    installed = [line.strip() for line in installed if line.strip()]
    for code in language.split("+"):
        if code not in installed:
            raise ConfigError(
                f"image_ocr: tesseract has no language '{code}' (Debian: "
                f"tesseract-ocr-{code.replace('_', '-')}){nearest(code, installed)}"
            )
