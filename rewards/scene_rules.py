"""Whether labelled boxes are what a prompt asks for: one specification, and two sets of rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmgrpo.errors import nearest

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""

KEYS = ("class", "count", "color", "position")

REDUCTIONS: Mapping[str, Callable[[Sequence[bool]], float]] = {
    "share": lambda met: sum(met) / len(met),
    "all": lambda met: float(all(met)),
}
"""From which conditions are met to the score."""

RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Thing:
    """Something that is in a picture: its class and colour (None if unknown), and where it is."""

    name: str | None
    colour: str | None
    box: Box


@dataclass(frozen=True)
class Wanted:
    """One entry of the column ``include`` or ``exclude``, checked."""

    name: str
    count: int
    colour: str | None
    relation: str | None
    other: int | None

    def matches(self, things: Sequence[Thing]) -> list[Thing]:
        """The things of this class, and of this colour where one is given."""
        return [t for t in things if t.name == self.name and self.colour in (None, t.colour)]


@dataclass(frozen=True)
class Specification:
    """What should be in a picture, and what should not."""

    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]


class Rules(Protocol):
    """What "two red circles left of a square" means, given what was found."""

    def group(self, entry: Wanted, things: Sequence[Thing]) -> list[Thing]:
        """The things that an entry is about."""
        ...

    def counted(self, entry: Wanted, things: Sequence[Thing]) -> bool:
        """Whether the right number is there."""
        ...

    def coloured(self, entry: Wanted, group: Sequence[Thing]) -> bool:
        """Whether the entry's things have its colour."""
        ...

    def placed(self, entry: Wanted, group: Sequence[Thing], others: Sequence[Box]) -> bool:
        """Whether the entry's things stand to the other entry's as they should."""
        ...

    def unwanted(self, entry: Wanted, things: Sequence[Thing]) -> int:
        """How many things of an entry of ``exclude`` there are."""
        ...


@dataclass(frozen=True)
class ExactRules:
    """Exactly the number asked for, all of one colour; positions compare centres.

    Attributes:
        margin: by how many pixels a centre must stand further left, right, up or down.
    """

    margin: float

    def group(self, entry: Wanted, things: Sequence[Thing]) -> list[Thing]:
        """All of the class and colour."""
        return entry.matches(things)

    def counted(self, entry: Wanted, things: Sequence[Thing]) -> bool:
        """As many of the class and colour as were asked for, no more."""
        return len(entry.matches(things)) == entry.count

    def coloured(self, entry: Wanted, group: Sequence[Thing]) -> bool:  # noqa: ARG002 - a protocol
        """One of the class and colour is there."""
        return bool(group)

    def placed(self, entry: Wanted, group: Sequence[Thing], others: Sequence[Box]) -> bool:
        """As many as were asked for stand so to some other thing."""
        right = [t for t in group if any(self._stands(entry.relation, t.box, o) for o in others)]
        return len(right) >= entry.count

    def unwanted(self, entry: Wanted, things: Sequence[Thing]) -> int:
        """Those of the class, and of the colour where one is given."""
        return len(entry.matches(things))

    def _stands(self, relation: str | None, box: Box, other: Box) -> bool:
        (x, y), (other_x, other_y) = _centre(box), _centre(other)
        right, down = x - other_x, y - other_y
        clear = {"left of": -right, "right of": right, "above": -down, "below": down}
        return relation is not None and clear[relation] > self.margin


@dataclass(frozen=True)
class GenevalRules:
    """GenEval's own rules (arXiv 2310.11513, ``evaluation/evaluate_images.py``).

    At least ``count`` of the class must be found. Colour and position look at the ``count`` most
    confident ones only, so things come with the most confident first: all of them must have the
    colour, and every one must stand so to every one of the other entry's.

    Attributes:
        overlap: share of the two boxes' sizes by which a centre must be off; 0.1 in GenEval.
    """

    overlap: float = 0.1

    def group(self, entry: Wanted, things: Sequence[Thing]) -> list[Thing]:
        """The most confident of the class, as many as were asked for."""
        return [t for t in things if t.name == entry.name][: entry.count]

    def counted(self, entry: Wanted, things: Sequence[Thing]) -> bool:
        """As many of the class as were asked for, or more."""
        return len(self.group(entry, things)) >= entry.count

    def coloured(self, entry: Wanted, group: Sequence[Thing]) -> bool:
        """As many as were asked for have the colour."""
        return sum(thing.colour == entry.colour for thing in group) >= entry.count

    def placed(self, entry: Wanted, group: Sequence[Thing], others: Sequence[Box]) -> bool:
        """Every one stands so to every other."""
        pairs = [(thing.box, other) for thing in group for other in others]
        return bool(pairs) and all(entry.relation in self.relations(*pair) for pair in pairs)

    def unwanted(self, entry: Wanted, things: Sequence[Thing]) -> int:
        """Those of the class; GenEval's ``exclude`` has no colours."""
        return len(entry.matches(things))

    def relations(self, box: Box, other: Box) -> set[str]:
        """Return how the first box stands to the second: no, one or two of ``RELATIONS``.

        With the centres' offset d and the boxes' sizes s, the offset that counts in each direction
        is ``max(|d| - overlap * (s + s_other), 0)``; there is a relation where it exceeds half of
        the whole offset's length.
        """
        (x, y), (other_x, other_y) = _centre(box), _centre(other)
        offset = (x - other_x, y - other_y)
        sizes = (box[2] - box[0] + other[2] - other[0], box[3] - box[1] + other[3] - other[1])
        counts = [
            math.copysign(max(abs(d) - self.overlap * size, 0.0), d)
            for d, size in zip(offset, sizes, strict=True)
        ]
        if max(map(abs, counts)) < 1e-3:
            return set()
        right, down = (count / math.hypot(*offset) for count in counts)
        strength = {"left of": -right, "right of": right, "above": -down, "below": down}
        return {relation for relation, value in strength.items() if value > 0.5}


def conditions(
    specification: Specification, things: Sequence[Thing], rules: Rules, size: tuple[int, int]
) -> list[bool]:
    """Return which conditions are met, entry by entry, those of ``exclude`` last.

    An entry has two conditions, that its class is there at all and how many there are, and one
    more each for a colour and a position.

    Args:
        specification: what the prompt asks for.
        things: what was found, the most confident first.
        rules: what counts.
        size: width and height of the picture; its middle is what a position without an entry is
            relative to.
    """
    groups = [rules.group(entry, things) for entry in specification.include]
    middle: Box = (size[0] / 2, size[1] / 2, size[0] / 2, size[1] / 2)
    met: list[bool] = []
    for entry, group in zip(specification.include, groups, strict=True):
        met.append(any(thing.name == entry.name for thing in things))
        met.append(rules.counted(entry, things))
        if entry.colour is not None:
            met.append(rules.coloured(entry, group))
        if entry.relation is not None:
            others = [middle] if entry.other is None else [t.box for t in groups[entry.other]]
            met.append(rules.placed(entry, group, others))
    return met + [rules.unwanted(e, things) < e.count for e in specification.exclude]


def read_specification(
    include: Sequence[Any],
    exclude: Sequence[Any],
    classes: Collection[str] | None,
    colours: Collection[str],
) -> Specification:
    """Check the entries of a prompt.

    Args:
        include: entries, see :class:`~mmgrpo.rewards.image_shapes.ImageShapes`.
        exclude: entries that count what must not be there.
        classes: the known classes; None if any text is one.
        colours: the known colours.

    Raises:
        ValueError: says which entry cannot be understood, and what is near.
    """
    if not include and not exclude:
        raise ValueError("include is empty: there is no condition to meet")
    total = len(include)
    return Specification(
        tuple(_checked(entry, total, classes, colours) for entry in include),
        tuple(_checked(entry, total, classes, colours) for entry in exclude),
    )


def _checked(
    entry: Any, entries: int, classes: Collection[str] | None, colours: Collection[str]
) -> Wanted:
    if not isinstance(entry, Mapping):
        raise ValueError(f"an entry of include must be an object; got {entry!r}")
    # A table that was read from columns has every key in every entry, null where it was not given.
    given = {key: value for key, value in entry.items() if value is not None}
    for key in given:
        if key not in KEYS:
            raise ValueError(f"unknown key '{key}' in {dict(entry)}{nearest(key, KEYS)}")
    name, colour = given.get("class"), given.get("color")
    relation, other = given.get("position", (None, None))
    if classes is None and not (isinstance(name, str) and name):
        raise ValueError(f"class must be text; got {name!r}")
    for what, value, known in (
        ("class", name, (name,) if classes is None else classes),
        ("color", colour, (None, *colours)),
        ("position", relation, (None, *RELATIONS)),
    ):
        if value not in known:
            names = [choice for choice in known if choice is not None]
            raise ValueError(f"unknown {what} '{value}'{nearest(value or '', names)}")
    count = given.get("count", 1)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be a positive integer; got {count!r} (use exclude for none)")
    if other is not None and not (isinstance(other, int) and 0 <= other < entries):
        raise ValueError(f"position must name one of the {entries} entries; got {other!r}")
    return Wanted(str(name), count, colour, relation, other)


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
