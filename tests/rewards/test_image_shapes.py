"""The shape verifier against pictures drawn from the specification, sharp and soft, any way up."""

import math
import random

import numpy as np
import pytest
from contract import Case, check_contract
from PIL import Image, ImageDraw, ImageFilter

from mmgrpo.errors import ConfigError
from mmgrpo.rewards.image_shapes import ImageShapes
from mmgrpo.rewards.shape_finding import COLOURS, SHAPES, find_shapes

SIZE = 128


def polygon(shape, x, y, radius, angle):
    """Corners of a shape of the given circumradius; round shapes are polygons of 60 corners."""
    corners = {
        "circle": [(1.0, 2 * math.pi * k / 60) for k in range(60)],
        "square": [(1.0, math.pi / 4 + math.pi / 2 * k) for k in range(4)],
        "triangle": [(1.0, 2 * math.pi / 3 * k) for k in range(3)],
        "star": [(1.0 if k % 2 == 0 else 0.382, math.pi / 5 * k) for k in range(10)],
    }
    flat = {
        "ellipse": [(math.cos(a), 0.55 * math.sin(a)) for _, a in corners["circle"]],
        "rectangle": [(0.9, 0.45), (-0.9, 0.45), (-0.9, -0.45), (0.9, -0.45)],
        "cross": [
            (3 * a, 3 * b)
            for a, b in (
                (0.1, 0.3), (-0.1, 0.3), (-0.1, 0.1), (-0.3, 0.1), (-0.3, -0.1), (-0.1, -0.1),
                (-0.1, -0.3), (0.1, -0.3), (0.1, -0.1), (0.3, -0.1), (0.3, 0.1), (0.1, 0.1),
            )
        ],
    }  # fmt: skip
    points = flat.get(shape) or [(r * math.cos(a), r * math.sin(a)) for r, a in corners[shape]]
    turn, lift = math.cos(angle), math.sin(angle)
    return [(x + radius * (a * turn - b * lift), y + radius * (a * lift + b * turn))
            for a, b in points]  # fmt: skip


def draw(things, background="white", blur=0.0, size=SIZE, oversample=4):
    """A picture of (shape, colour, x, y, radius, angle), anti-aliased."""
    picture = Image.new("RGB", (size * oversample, size * oversample), COLOURS[background])
    pen = ImageDraw.Draw(picture)
    for shape, colour, *place, angle in things:
        pen.polygon(polygon(shape, *(oversample * p for p in place), angle), fill=COLOURS[colour])
    picture = picture.resize((size, size), Image.Resampling.BOX)
    return picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture


def scatter(seed, background, count=4, cells=3):
    """Random shapes in different cells of a grid, none in the background's colour."""
    rng = random.Random(seed)
    colours = [name for name in COLOURS if name != background]
    step = SIZE / cells
    for cell in rng.sample(range(cells * cells), count):
        x, y = (cell % cells + 0.5) * step, (cell // cells + 0.5) * step
        radius = rng.uniform(0.3, 0.42) * step
        yield rng.choice(SHAPES), rng.choice(colours), x, y, radius, rng.uniform(0, 2 * math.pi)


def names(picture):
    return sorted((s.name, s.colour) for s in find_shapes(np.asarray(picture)))


@pytest.mark.parametrize("background", ["white", "black", "gray"])
@pytest.mark.parametrize("blur", [0.0, 0.6])
def test_what_is_drawn_is_found(background, blur):
    drawn = [list(scatter(seed, background)) for seed in range(25)]
    for things in drawn:
        found = find_shapes(np.asarray(draw(things, background, blur)))
        assert sorted((str(s.name), s.colour) for s in found) == sorted(t[:2] for t in things)
        for shape, colour, x, y, *_ in things:
            places = [(s.x, s.y) for s in found if (s.name, s.colour) == (shape, colour)]
            assert min(math.dist((x, y), place) for place in places) < 0.75


def test_noise_specks_and_seams_are_no_shapes():
    picture = draw([("circle", "red", 64, 64, 30, 0)])
    noisy = np.asarray(picture).astype(int) + np.random.default_rng(0).integers(
        -25, 26, (128, 128, 3)
    )
    noisy[10, 10], noisy[100:102, 20:60] = (0, 0, 255), (0, 160, 0)
    assert names(noisy.clip(0, 255).astype(np.uint8)) == [("circle", "red")]
    assert names(Image.new("RGB", (32, 32), "white")) == []


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
@pytest.mark.parametrize("colour", ["red", "blue", "green"])
def test_small_pictures_are_enlarged(shape, colour):
    """Eight pixels across: without it a circle is a square, and seams are brown shapes."""
    angle = {"circle": 0.0, "square": 0.0, "triangle": -math.pi / 2}[shape]
    small = draw([(shape, colour, 7.3, 15.6, 5.5, angle)], "black", size=24)
    (found,) = find_shapes(np.asarray(small))
    assert (found.name, found.colour) == (shape, colour)
    assert math.dist((found.x, found.y), (7.3, 15.6)) < 0.5
    assert found.area == pytest.approx({"circle": 95, "square": 60, "triangle": 39}[shape], rel=0.2)


def test_touching_shapes_of_two_colours_are_two():
    things = [("square", "red", 40, 64, 30, 0), ("square", "blue", 82.4, 64, 30, 0)]
    assert names(draw(things)) == [("square", "blue"), ("square", "red")]


def test_outlined_and_nested_shapes_are_named_by_their_outline():
    ring = [("circle", "red", 64, 64, 40, 0), ("circle", "white", 64, 64, 30, 0)]
    assert names(draw(ring)) == [("circle", "red")]
    nested = [("square", "black", 64, 64, 50, 0.3), ("star", "yellow", 64, 64, 25, 0)]
    assert names(draw(nested)) == [("square", "black"), ("star", "yellow")]


def test_an_outline_that_is_none_of_them_has_no_name():
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(picture)
    pen.line([(10, 20), (64, 110), (118, 20)], fill=COLOURS["red"], width=7)
    assert [s.name for s in find_shapes(np.asarray(picture))] == [None]


RED, BLUE = ("circle", "red", 30, 64, 18, 0.0), ("square", "blue", 95, 64, 22, 0.3)
INCLUDE = [
    {"class": "circle", "color": "red", "position": ["left of", 1]},
    {"class": "square", "color": "blue", "count": 1},
]
"""Seven conditions: 4 of the first entry, 3 of the second."""


@pytest.mark.parametrize(
    ("things", "met"),
    [
        ([RED, BLUE], 7),
        ([RED], 3 + 0),
        ([BLUE], 0 + 3),
        ([], 0),
        ([("circle", "red", 95, 64, 18, 0), ("square", "blue", 30, 64, 22, 0)], 6),
        ([("circle", "green", 30, 64, 18, 0), BLUE], 1 + 3),
        ([RED, ("circle", "red", 30, 110, 12, 0), BLUE], 3 + 3),
        ([RED, BLUE, ("circle", "green", 30, 110, 12, 0)], 7),
    ],
)
def test_conditions_are_counted(things, met):
    picture = draw(things)
    assert ImageShapes()(images=[picture], include=[INCLUDE]) == [pytest.approx(met / 7)]
    assert ImageShapes(reduce="all")(images=[picture], include=[INCLUDE]) == [float(met == 7)]


@pytest.mark.parametrize(
    ("relation", "where"),
    [("left of", (-1, 0)), ("right of", (1, 0)), ("above", (0, -1)), ("below", (0, 1))],
)
def test_positions_to_another_shape_and_to_the_middle(relation, where):
    place = [64 + 35 * part for part in where]
    picture = draw([("star", "purple", *place, 18, 0.2), ("cross", "orange", 64, 64, 14, 0)])
    others = {"left of", "right of", "above", "below"} - {relation}
    for target in (1, None):
        for asked, expected in [(relation, 1.0), *((other, 0.0) for other in others)]:
            entry = {"class": "star", "position": [asked, target]}
            include = [entry, {"class": "cross"}]
            assert ImageShapes(reduce="all")(images=[picture], include=[include]) == [expected]


def test_counts_and_exclusions():
    three = draw([("triangle", "green", 25 + 38 * k, 64, 15, k) for k in range(3)])
    score = ImageShapes(reduce="all")
    for count, expected in [(2, 0.0), (3, 1.0), (4, 0.0)]:
        assert score(images=[three], include=[[{"class": "triangle", "count": count}]]) == [
            expected
        ]
        unwanted = [{"class": "triangle", "count": count}]
        assert score(images=[three], include=[[]], exclude=[unwanted]) == [float(count > 3)]


def test_columns_read_from_a_table_have_nulls():
    entry = {"class": "circle", "color": "red", "count": None, "position": None}
    assert ImageShapes()(images=[draw([RED])] * 2, include=[[entry], None]) == [1.0, None]


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([{"class": "cirle"}], "unknown class 'cirle'; did you mean 'circle'"),
        ([{}], "unknown class 'None'"),
        ([{"class": "circle", "color": "rd"}], "unknown color 'rd'; did you mean 'red'"),
        ([{"class": "circle", "colour": "red"}], "unknown key 'colour'.*'color'"),
        ([{"class": "circle", "count": 0}], "positive integer"),
        ([{"class": "circle", "position": ["left", 0]}], "did you mean 'left of'"),
        ([{"class": "circle", "position": ["left of", 1]}], "one of the 1 entries; got 1"),
        (["circle"], "must be an object"),
        ([], "no condition"),
    ],
)
def test_a_bad_specification_is_our_failure(include, message):
    with pytest.raises(ValueError, match=message):
        ImageShapes()(images=[draw([RED])], include=[include])


def test_bad_options():
    with pytest.raises(ConfigError, match="did you mean 'share'"):
        ImageShapes(reduce="shares")


def test_contract():
    pictures = [
        draw([RED, BLUE]),
        draw([]),
        draw([RED]),
        draw([BLUE, RED, RED], "gray"),
        draw([RED]),
    ]
    include = [INCLUDE] * 4 + [None]
    check_contract(Case(ImageShapes(), pictures, {"include": include}, low=0.0, high=1.0))
