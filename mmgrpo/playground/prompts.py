"""Prompts for real text-to-image models: written text, objects to count and place, scenes.

Templates in the manner of Flow-GRPO's sets (arXiv:2505.05470): ``ocr`` asks for quoted text,
``geneval`` for objects in the form that ``image_geneval`` and ``image_shapes`` read, ``scenes`` for
pictures that a preference model judges. Train and eval share no prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZES = {"train": 512, "eval": 64}
SURFACES = (
    "a wooden sign by the road", "a neon sign over a bar", "the cover of an old book",
    "a birthday cake", "a white T-shirt", "a blackboard in a classroom", "a road sign",
    "a coffee mug", "a shop window", "a protest banner", "a ticket on a desk", "a train's side",
    "a chalk board outside a cafe", "a subway map's title", "a spaceship's hull", "a postcard",
)  # fmt: skip
WORDS = (
    "open", "closed", "welcome", "north gate", "do not enter", "fresh bread", "exit", "lost cat",
    "happy birthday", "thank you", "quiet please", "platform 9", "low tide", "keep left", "hello",
    "sold out", "ice cream", "library", "no parking", "good night", "harbor", "museum", "stay calm",
    "mind the gap", "free books", "winter sale", "blue moon", "garden", "train 42", "page one",
)  # fmt: skip
OBJECTS = (
    "apple", "backpack", "bear", "bench", "bicycle", "bird", "book", "bottle", "bowl", "bus",
    "cake", "car", "cat", "chair", "clock", "cow", "cup", "dog", "elephant", "giraffe", "horse",
    "orange", "pizza", "sheep", "skateboard", "suitcase", "teddy bear", "train", "umbrella",
    "zebra",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = ("left of", "right of", "above", "below")
SUBJECTS = (
    "an old fisherman", "a fox", "a lighthouse", "a violin player", "a robot gardener", "a castle",
    "a street market", "a sailing ship", "a sleeping child", "a mountain village", "a tea house",
    "two dancers", "a snow leopard", "a night train", "a glass bridge", "a lantern festival",
)  # fmt: skip
LIGHTS = (
    "at dawn", "in heavy rain", "under a full moon", "in golden evening light", "in thick fog",
    "in the first snow", "in harsh noon light", "lit by a single candle",
)  # fmt: skip
STYLES = (
    "an oil painting", "a watercolour", "a photograph", "a charcoal drawing", "a woodcut",
    "a film still", "an isometric illustration", "a pencil sketch",
)  # fmt: skip

Row = dict[str, Any]


def build_prompts(
    folder: Path, *, seed: int = 0, progress: Callable[[str], None] | None = None
) -> None:
    """Write ``<set>.train.jsonl`` and ``<set>.eval.jsonl`` for every set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in SETS.items():
        distinct = {row["prompt"]: row for row in rows()}
        shuffled = random.Random(f"{name} {seed}").sample(list(distinct.values()), len(distinct))
        parts = {"eval": shuffled[: SIZES["eval"]], "train": shuffled[SIZES["eval"] :]}
        for part, chosen in parts.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in chosen[: SIZES[part]]]
            (folder / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if progress is not None:
            progress(f"prompts: {name}, {len(distinct)} distinct")


def ocr() -> Iterator[Row]:
    """Text to write, in the column ``text`` and quoted in the prompt."""
    for surface in SURFACES:
        for words in WORDS:
            yield {"prompt": f'{surface} with the text "{words}"', "text": words}
            yield {"prompt": f'a close photo of {surface} that says "{words}"', "text": words}


def geneval() -> Iterator[Row]:
    """The six kinds of GenEval (arXiv:2310.11513), with ``include``, ``exclude`` and ``tag``.

    In ``questions``, what a generator may be asked about its picture, and the answers (UniRL,
    arXiv:2505.23380, takes the same six kinds).
    """
    for one in OBJECTS:
        yield _scene("single_object", _article(one), [_thing(one)], ["What is this?", one])
        for number, word in NUMBERS.items():
            many = _plural(one)
            asked = [f"How many {many} are there?", word]
            row = _scene("counting", f"{word} {many}", [_thing(one, count=number)], asked)
            yield {**row, "exclude": [{"class": one, "count": number + 1}]}
        for colour in COLOURS:
            if colour != one:
                thing = _thing(one, color=colour)
                words = _article(f"{colour} {one}")
                yield _scene("colors", words, [thing], _colour_of(one, colour))
    for place, one in enumerate(OBJECTS):
        for step in (3, 7, 11):
            other = OBJECTS[(place + step) % len(OBJECTS)]
            things = [_thing(one), _thing(other)]
            both = f"{_article(one)} and {_article(other)}"
            pairs = ((one, other), (other, one))
            beside = [[f"What is there beside the {a}?", b] for a, b in pairs]
            yield _scene("two_object", both, things, *beside)
            where = PLACES[(place + step) % len(PLACES)]
            placed = [_thing(other), _thing(one, position=[where, 0])]
            asked = [f"Where is the {one}: {', '.join(PLACES)} the {other}?", where]
            words = f"{_article(one)} {where} {_article(other)}"
            yield _scene("position", words, placed, asked)
            first, second = COLOURS[place % 10], COLOURS[(place + step) % 10]
            worded = f"{_article(f'{first} {one}')} and {_article(f'{second} {other}')}"
            coloured = [_thing(one, color=first), _thing(other, color=second)]
            colours = _colour_of(one, first), _colour_of(other, second)
            yield _scene("color_attr", worded, coloured, *colours)


def scenes() -> Iterator[Row]:
    """Pictures that people would like or not."""
    for style in STYLES:
        for subject in SUBJECTS:
            for light in LIGHTS:
                yield {"prompt": f"{style} of {subject} {light}"}


SETS: dict[str, Callable[[], Iterator[Row]]] = {"ocr": ocr, "geneval": geneval, "scenes": scenes}
"""Name -> all rows of the set."""


def _scene(tag: str, words: str, include: list[Row], *questions: list[str]) -> Row:
    row = {"prompt": f"a photo of {words}", "tag": tag, "include": include, "exclude": None}
    return {**row, "questions": [*questions]}


def _colour_of(name: str, colour: str) -> list[str]:
    return [f"What colour is the {name}?", colour]


def _thing(name: str, count: int = 1, **more: Any) -> Row:
    return {"class": name, "count": count, **more}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    irregular = {"sheep": "sheep"}
    ending = "es" if name.endswith(("s", "ch", "x")) else "s"
    return irregular.get(name, name + ending)
