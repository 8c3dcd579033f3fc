"""The rules about labelled boxes: GenEval's against its definition, by brute force and by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo.rewards.scene_rules import (
    ExactRules,
    GenevalRules,
    Thing,
    conditions,
    read_specification,
)

NAMES, COLOURS = ("cat", "dog"), ("red", "blue")
SIZE = (100, 100)


def thing(name, x=50.0, y=50.0, colour=None, width=10.0, height=10.0):
    return Thing(name, colour, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def verdict(include, things, exclude=(), rules=None):
    wanted = read_specification(include, exclude, NAMES, COLOURS)
    return conditions(wanted, things, rules or GenevalRules(), SIZE)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((0, 0), set()),
        ((2, 0), set()),  # 0.1 of both widths
        ((3, 0), set()),  # 1 of 3 counts
        ((4, 0), set()),  # exactly half of it
        ((4.1, 0), {"right of"}),
        ((-30, 0), {"left of"}),
        ((0, -30), {"above"}),
        ((0, 30), {"below"}),
        ((30, 30), {"right of", "below"}),  # 28 / 42.4 each
        ((10, 30), {"below"}),  # 8 / 31.6 to the right
        ((-60, -50), {"left of", "above"}),
    ],
)
def test_relations_by_hand(offset, expected):
    other = thing("dog")
    moved = thing("cat", 50 + offset[0], 50 + offset[1])
    assert GenevalRules().relations(moved.box, other.box) == expected


COORDINATE = st.integers(0, 12).map(lambda n: 8.0 * n)
BOXES = st.tuples(COORDINATE, COORDINATE, st.integers(4, 30), st.integers(4, 30))


def published_relations(a, b, threshold=0.1):
    """GenEval's definition on centres and sizes ``(x, y, width, height)``."""
    found = set()
    length = math.hypot(a[0] - b[0], a[1] - b[1])
    names = (("left of", "right of"), ("above", "below"))
    revised = []
    for axis in (0, 1):
        offset = a[axis] - b[axis]
        revised.append(
            max(abs(offset) - threshold * (a[axis + 2] + b[axis + 2]), 0)
            * (offset > 0 or -(offset < 0))
        )
    if abs(revised[0]) < 1e-3 and abs(revised[1]) < 1e-3:
        return found
    for axis in (0, 1):
        if revised[axis] / length < -0.5:
            found.add(names[axis][0])
        if revised[axis] / length > 0.5:
            found.add(names[axis][1])
    return found


@given(BOXES, BOXES)
def test_relations_are_their_definition(a, b):
    boxes = [thing("cat", x, y, None, w, h).box for x, y, w, h in (a, b)]
    assert GenevalRules().relations(*boxes) == published_relations(a, b)
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert GenevalRules().relations(*boxes[::-1]) == {
        mirrored[r] for r in GenevalRules().relations(*boxes)
    }


def published_verdict(include, exclude, objects):
    """GenEval's loop over the entries; ``objects`` by class, the most confident first."""
    correct, matched = True, []
    for entry in include:
        found = objects.get(entry["class"], [])[: entry["count"]]
        fits = len(found) >= entry["count"]
        if fits and "color" in entry:
            fits = [t.colour for t in found].count(entry["color"]) >= entry["count"]
        if fits and "position" in entry:
            relation, target = entry["position"]
            fits = matched[target] is not None and all(
                relation in GenevalRules().relations(a.box, b.box)
                for a in found
                for b in matched[target]
            )
        matched.append(found if fits else None)
        correct = correct and fits
    for entry in exclude:
        correct = correct and len(objects.get(entry["class"], [])) < entry["count"]
    return correct


THINGS = st.lists(
    st.builds(
        thing, st.sampled_from(NAMES), COORDINATE, COORDINATE, st.sampled_from((*COLOURS, None))
    ),
    max_size=5,
)
ENTRY = st.fixed_dictionaries(
    {"class": st.sampled_from(NAMES), "count": st.integers(1, 2)},
    optional={"color": st.sampled_from(COLOURS)},
)


@given(
    st.lists(ENTRY, min_size=2, max_size=2),
    st.sampled_from([None, "left of", "above"]),
    st.lists(
        st.fixed_dictionaries({"class": st.just("cat"), "count": st.integers(1, 3)}), max_size=1
    ),
    THINGS,
)
def test_all_conditions_together_are_genevals_verdict(include, relation, exclude, things):
    if relation:
        include[1]["position"] = [relation, 0]
    objects = {name: [t for t in things if t.name == name] for name in NAMES}
    expected = published_verdict(include, exclude, objects)
    assert all(verdict(include, things, exclude)) == expected


def test_two_rules_differ_where_they_should():
    three = [thing("cat", 10 * k, colour="red") for k in range(3)]
    two = [{"class": "cat", "count": 2}]
    assert verdict(two, three) == [True, True]
    assert verdict(two, three, rules=ExactRules(2.0)) == [True, False]
    # GenEval looks at the most confident only, the exact rules at any.
    mixed = [thing("cat", colour="blue"), thing("cat", colour="red")]
    red = [{"class": "cat", "color": "red"}]
    assert verdict(red, mixed) == [True, True, False]
    assert verdict(red, mixed, rules=ExactRules(2.0)) == [True, True, True]


def test_conditions_come_entry_by_entry():
    include = [
        {"class": "cat", "color": "red", "position": ["left of", 1]},
        {"class": "dog", "count": 2},
    ]
    there = [thing("cat", 10, colour="red"), thing("dog", 80), thing("dog", 90)]
    for gone, expected in (
        ((), [True] * 6),
        ((0,), [False, False, False, False, True, True]),
        ((1,), [True, True, True, True, True, False]),
        ((1, 2), [True, True, True, False, False, False]),
    ):
        kept = [t for number, t in enumerate(there) if number not in gone]
        assert verdict(include, kept) == expected


def test_every_one_must_stand_so_to_every_other():
    include = [{"class": "cat", "count": 2, "position": ["left of", 1]}, {"class": "dog"}]
    for x in (10, 90):
        found = [thing("cat", 10), thing("cat", x), thing("dog", 50)]
        assert verdict(include, found)[2] is (x == 10)
        assert verdict(include, found, rules=ExactRules(2.0))[2] is (x == 10)


def test_the_middle_of_the_picture_is_a_place():
    include = [{"class": "cat", "position": ["above", None]}]
    for rules in (GenevalRules(), ExactRules(2.0)):
        assert verdict(include, [thing("cat", 50, 10)], rules=rules)[-1]
        assert not verdict(include, [thing("cat", 50, 90)], rules=rules)[-1]


def test_open_classes_are_any_text():
    wanted = read_specification([{"class": "zebra"}], [], None, COLOURS)
    assert wanted.include[0].name == "zebra"
    for name in (None, "", 3):
        with pytest.raises(ValueError, match="class must be text"):
            read_specification([{"class": name}], [], None, COLOURS)
