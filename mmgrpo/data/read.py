"""Data file in, prompts out; every row and every image is checked before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmgrpo.data.images import LazyImages, image_refs
from mmgrpo.data.messages import check_messages, flatten_text, place_images
from mmgrpo.data.rows import Row, read_rows
from mmgrpo.errors import ConfigError, DataError, nearest
from mmgrpo.protocols import Message, Prompt


@dataclass(frozen=True)
class _Modality:
    chat: bool
    images: bool


_MODALITIES = {
    "text": _Modality(chat=True, images=False),
    "vision": _Modality(chat=True, images=True),
    "image": _Modality(chat=False, images=True),
    "video": _Modality(chat=False, images=False),
    "masked_text": _Modality(chat=True, images=False),
    "image_tokens": _Modality(chat=False, images=False),
    "image_scales": _Modality(chat=False, images=False),
}


@dataclass(frozen=True)
class _Reader:
    """What turns a row into a prompt."""

    modality: str
    prompt_column: str
    image_column: str | None
    system_prompt: str | None

    def __post_init__(self) -> None:
        if self.modality not in _MODALITIES:
            raise ConfigError(
                f"unknown modality '{self.modality}'{nearest(self.modality, _MODALITIES)}"
            )
        if self.system_prompt is not None and not _MODALITIES[self.modality].chat:
            raise ConfigError(
                f"a system prompt has no effect on the {self.modality} generator; remove it."
            )

    def prompt(self, row: Row, index: int) -> Prompt:
        """Raises ValueError with one clause that says what is wrong with the row."""
        values = dict(row.values)
        content = self._pop_content(values)
        column = image_refs(self._pop_images(values), row.folder)
        if isinstance(content, str) and not content.strip():
            raise ValueError("the prompt is empty")
        kind = _MODALITIES[self.modality]
        if column and not kind.images:
            raise ValueError(
                f"the row has images, and modality '{self.modality}' takes text prompts"
            )
        if not kind.chat and not isinstance(content, str):
            raise ValueError(
                f"the {self.modality} generator's prompt must be text; got {_kind_of(content)}"
            )
        if not kind.chat:
            return Prompt(index, content, LazyImages(column) if column else (), values, row.where)
        messages = _as_messages(content)
        if kind.images:
            messages, column = place_images(messages, column, row.folder)
        else:
            messages = flatten_text(messages)
        plain = isinstance(content, str) and not column
        final = self._with_system(content if plain else messages)
        return Prompt(index, final, LazyImages(column) if column else (), values, row.where)

    def _pop_content(self, values: dict[str, Any]) -> Any:
        for name in (self.prompt_column, "messages"):
            if values.get(name) is not None:
                return values.pop(name)
        if self.prompt_column in values:
            raise ValueError(f"the prompt column '{self.prompt_column}' is null")
        raise ValueError(
            f"no prompt column '{self.prompt_column}'{nearest(self.prompt_column, values)}"
        )

    def _pop_images(self, values: dict[str, Any]) -> Any:
        """The alternative name ``image`` is read when the named column is absent or null."""
        names = [] if self.image_column is None else [self.image_column, "image"]
        for name in names:
            if values.get(name) is not None:
                return values.pop(name)
        return None

    def _with_system(self, content: str | list[Message]) -> str | list[Message]:
        if self.system_prompt is None:
            return content
        messages = _as_messages(content)
        if messages[0]["role"] == "system":
            raise ValueError("the row starts with a system message, and a system prompt is set too")
        return [{"role": "system", "content": self.system_prompt}, *messages]


def read_prompts(
    path: str | Path,
    *,
    modality: str,
    prompt_column: str = "prompt",
    image_column: str | None = "images",
    system_prompt: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read and check a data set.

    A prompt is text or a list of chat messages; a column ``messages`` is read where the prompt
    column is absent. Images are given by ``image_column`` (or ``image``) or inside the messages,
    as paths, bytes or PIL images; see :func:`~mmgrpo.data.messages.place_images` for how they meet
    their placeholders. They stay compressed and are decoded when used. All other columns go to the
    rewards.

    Args:
        path: see :func:`~mmgrpo.data.rows.read_rows`.
        modality: ``text``, ``vision``, or ``image`` and ``video`` (generators of them).
        prompt_column: column that holds the prompt.
        image_column: column that holds the images; None leaves such columns to the rewards.
        system_prompt: put before every prompt, which then is a chat.
        limit: read only the first rows.

    Raises:
        DataError: names the first bad row (``file:line``, or ``file row N`` counted from 1), what
            was expected, and how many more are bad.
        ConfigError: unknown modality, or a system prompt for an image generator.
    """
    path = Path(path).expanduser()
    reader = _Reader(modality, prompt_column, image_column, system_prompt)
    prompts = _read(islice(read_rows(path), limit), reader)
    if not prompts:
        raise DataError(f"data '{path}' holds no rows.")
    return prompts


def rows_to_prompts(
    rows: Iterable[Mapping[str, Any]],
    *,
    modality: str,
    prompt_column: str = "prompt",
    image_column: str | None = "images",
    system_prompt: str | None = None,
) -> list[Prompt]:
    """Check rows in memory as :func:`read_prompts` checks a file.

    Relative image paths start at the working folder.

    Raises:
        DataError, ConfigError: as :func:`read_prompts`; rows are counted from 1.
    """
    reader = _Reader(modality, prompt_column, image_column, system_prompt)
    named = (Row(f"row {number}", dict(row), Path()) for number, row in enumerate(rows, start=1))
    prompts = _read(named, reader)
    if not prompts:
        raise DataError("the data has no rows.")
    return prompts


def check_columns(prompts: Sequence[Prompt], required: Iterable[str], reward_name: str) -> None:
    """Check that every row has the columns that a reward needs.

    Raises:
        DataError: names the reward, the column, the first row without it and the nearest column.
    """
    for column in sorted(required):
        for prompt in prompts:
            if column not in prompt.columns:
                raise DataError(
                    f"reward '{reward_name}' needs the column '{column}', which row "
                    f"{prompt.index + 1} does not have{nearest(column, prompt.columns)}"
                )


def _read(rows: Iterable[Row], reader: _Reader) -> list[Prompt]:
    prompts: list[Prompt] = []
    places: list[str] = []
    problems: list[str] = []
    for index, row in enumerate(rows):
        try:
            prompts.append(reader.prompt(row, index))
            places.append(row.where)
        except ValueError as error:
            problems.append(f"{row.where}: {error}")
    problems += _image_problems(prompts, places)
    if problems:
        more = f" ({len(problems) - 1} more rows are bad)" if len(problems) > 1 else ""
        sentence = problems[0].rstrip(".") + more
        raise DataError(sentence if sentence.endswith("?") else f"{sentence}.")
    return prompts


def _as_messages(content: Any) -> list[Message]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    return check_messages(content)


def _kind_of(value: Any) -> str:
    return "chat messages" if isinstance(value, list) else type(value).__name__


def _image_problems(prompts: Sequence[Prompt], places: Sequence[str]) -> list[str]:
    """Decoding releases the interpreter lock, so threads help."""

    def problem(prompt: Prompt, place: str) -> str | None:
        try:
            for ref in getattr(prompt.images, "refs", ()):
                ref.check()
        except ValueError as error:
            return f"{place}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(problem, prompts, places) if found]
