"""Chat messages: checked, and with one ``{"type": "image"}`` part for every image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmgrpo.data.images import ImageRef, image_refs
from mmgrpo.protocols import Message

IMAGE_MARKER = "<image>"
_IMAGE_PART = {"type": "image"}


def check_messages(value: Any) -> list[Message]:
    """Return a clean copy of chat messages in the Hugging Face format.

    Keys whose value is null, which tables add where rows differ, are removed.

    Raises:
        ValueError: one clause: which message is wrong, and what was expected.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"expected text or a non-empty list of chat messages as prompt; got {_shown(value)}"
        )
    messages = [_check_message(message, number) for number, message in enumerate(value, start=1)]
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; the prompt must end before its turn")
    return messages


def _check_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object; got {_shown(message)}")
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"message {number} has no '{key}'; it has {sorted(message)}")
    if not isinstance(message["role"], str):
        raise ValueError(f"message {number}: role must be text; got {_shown(message['role'])}")
    content = message["content"]
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise ValueError(f"message {number}: content must be text or parts; got {_shown(content)}")
    return message | {"content": [_check_part(part, number) for part in content]}


def _check_part(part: Any, number: int) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") not in _PART_CHECKS:
        raise ValueError(
            f"message {number}: a content part must be {{'type': 'text' or 'image', ...}}; "
            f"got {_shown(part)}"
        )
    part = {key: value for key, value in part.items() if value is not None}
    return _PART_CHECKS[part["type"]](part, number)


def _check_text_part(part: dict[str, Any], number: int) -> dict[str, Any]:
    if not isinstance(part.get("text"), str):
        raise ValueError(f"message {number}: a text part needs 'text'; got {_shown(part)}")
    return {"type": "text", "text": part["text"]}


def _check_image_part(part: dict[str, Any], _number: int) -> dict[str, Any]:
    """The image itself may stand in the part; it is kept under ``image`` for now."""
    keys = ("image", "path", "bytes", "image_url", "url")
    found = [part[key] for key in keys if key in part]
    value = found[0] if found else None
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    return _IMAGE_PART if value is None else {"type": "image", "image": value}


_PART_CHECKS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "text": _check_text_part,
    "image": _check_image_part,
    "image_url": _check_image_part,
}


def flatten_text(messages: list[Message]) -> list[Message]:
    """Return the messages with text parts joined, as text-only chat templates expect.

    Raises:
        ValueError: a message has an image part.
    """
    flat = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            if any(part["type"] == "image" for part in content):
                raise ValueError("the prompt has an image, and this is a text model")
            content = "".join(part["text"] for part in content)
        flat.append(message | {"content": content})
    return flat


def place_images(
    messages: list[Message], column: tuple[ImageRef, ...], folder: Path
) -> tuple[list[Message], tuple[ImageRef, ...]]:
    """Give every image one ``{"type": "image"}`` part, in order.

    A part that carries its image keeps it; the other parts take the column's images in turn. If
    there are no image parts, ``<image>`` markers in the users' text become parts; if there are no
    markers either, the images go before the first user message's text.

    Args:
        messages: checked messages.
        column: the row's image column.
        folder: where relative paths inside parts start.

    Returns:
        The messages, and all images in the order of their parts.

    Raises:
        ValueError: the numbers of parts and images differ.
    """
    if not _image_parts(messages):
        messages = [_split_markers(m) if m["role"] == "user" else m for m in messages]
    if not _image_parts(messages) and column:
        messages = _prepend_images(messages, len(column))
    parts = _image_parts(messages)
    waiting = [part for part in parts if "image" not in part]
    if len(waiting) != len(column):
        raise ValueError(
            f"the prompt has {len(waiting)} image placeholders and the row has {len(column)} images"
        )
    rest = iter(column)
    refs = tuple(
        ref
        for part in parts
        for ref in (image_refs(part["image"], folder) if "image" in part else (next(rest),))
    )
    return [_without_images(message) for message in messages], refs


def _image_parts(messages: list[Message]) -> list[dict[str, Any]]:
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for parts in lists for part in parts if part["type"] == "image"]


def _as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _split_markers(message: Message) -> Message:
    content = message["content"]
    if not any(IMAGE_MARKER in part["text"] for part in _as_parts(content)):
        return message
    parts: list[dict[str, Any]] = []
    for part in _as_parts(content):
        for number, text in enumerate(part["text"].split(IMAGE_MARKER)):
            parts += [_IMAGE_PART] if number else []
            parts += [{"type": "text", "text": text}] if text else []
    return message | {"content": parts}


def _prepend_images(messages: list[Message], count: int) -> list[Message]:
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError("the row has images and the prompt has no user message to hold them")
    first = messages[users[0]]
    changed = first | {"content": [_IMAGE_PART] * count + _as_parts(first["content"])}
    return [changed if message is first else message for message in messages]


def _without_images(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message
    return message | {"content": [_IMAGE_PART if p["type"] == "image" else p for p in content]}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
