"""The template judge: each cell shows what its nearest drawing shows, or something unknown."""

import numpy as np
import pytest
from contract import Case, check_contract
from PIL import Image

from mmgrpo.errors import ConfigError
from mmgrpo.rewards.image_templates import ImageTemplates

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}
CLASSES = {
    "bar": np.array([[0, 1, 0], [0, 1, 0], [0, 1, 0]]),
    "dot": np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]]),
}
BLANK = np.zeros((3, 3, 3), dtype=np.uint8)


def cell(name):
    """``red-bar`` as ``[3, 3, 3]``."""
    if name is None:
        return BLANK
    colour, _, shape = name.partition("-")
    return (CLASSES[shape][..., None] * np.array(COLOURS[colour])).astype(np.uint8)


def picture(*names, columns=2, scale=1):
    rows = [names[k : k + columns] for k in range(0, len(names), columns)]
    pixels = np.concatenate([np.concatenate([cell(n) for n in row], axis=1) for row in rows])
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))


def want(name, count=1, position=None):
    colour, _, shape = name.partition("-")
    entry = {"class": shape, "color": colour, "count": count}
    return entry if position is None else {**entry, "position": position}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("templates")
    Image.fromarray(BLANK).save(out / "blank.png")
    for name in ("red-bar", "blue-bar", "red-dot", "blue-dot"):
        Image.fromarray(cell(name)).save(out / f"{name}.png")
    return str(out)


TWO_BARS = [want("red-bar", 2)]
LEFT = [want("red-dot", position=["left of", 1]), want("blue-bar")]
ABOVE = [want("red-dot", position=["above", 1]), want("blue-bar")]


@pytest.mark.parametrize(
    ("shown", "include", "right"),
    [
        (("red-bar", None, None, "red-bar"), TWO_BARS, True),
        (("red-bar", None, None, None), TWO_BARS, False),
        (("red-bar", "red-bar", None, "red-bar"), TWO_BARS, False),
        (("red-bar", None, None, "blue-bar"), TWO_BARS, False),
        (("red-dot", "blue-bar", None, None), LEFT, True),
        (("blue-bar", "red-dot", None, None), LEFT, False),
        (("red-dot", None, "blue-bar", None), LEFT, False),
        (("red-dot", None, "blue-bar", None), ABOVE, True),
        ((None, "red-dot", "blue-bar", None), ABOVE, True),
    ],
)
@pytest.mark.parametrize("scale", [1, 5])
def test_a_picture_of_the_drawings_is_read(folder, shown, include, right, scale):
    judge = ImageTemplates(folder)
    assert judge(images=[picture(*shown, scale=scale)], include=[include]) == [float(right)]


def test_the_share_of_conditions(folder):
    share = ImageTemplates(folder, reduce="share")
    alone = picture("red-dot", None, None, None)
    # bar and its number and colour are missing, and so the position; dot is right, all is clear
    assert share(images=[alone], include=[LEFT]) == [pytest.approx(4 / 8)]


def test_a_smudge_is_no_shape_and_spoils_an_otherwise_right_picture(folder):
    pixels = np.asarray(picture("red-bar", "red-bar", None, None)).copy()
    judge = ImageTemplates(folder, max_distance=40.0)
    for level, right in ((39, 1.0), (41, 0.0)):  # a gray cell is as far from blank as it is bright
        pixels[3:, 3:] = level
        assert judge(images=[Image.fromarray(pixels)], include=[TWO_BARS]) == [right]


def test_other_grids(folder):
    judge = ImageTemplates(folder, grid=[1, 3])
    shown = picture("red-dot", None, "blue-bar", columns=3)
    assert judge(images=[shown], include=[LEFT]) == [1.0]


def test_rows_without_conditions_have_no_score(folder):
    assert ImageTemplates(folder)(images=[picture(*[None] * 4)], include=[None]) == [None]


def test_contract(folder):
    right, wrong = ("red-dot", "blue-bar", None, None), ("blue-bar", "red-dot", None, None)
    shown = [picture(*names) for names in (right, wrong, (None,) * 4, right)]
    columns = {"include": [LEFT, LEFT, LEFT, None]}
    check_contract(Case(ImageTemplates(folder), shown, columns, low=0.0, high=1.0))


def test_what_is_not_in_the_folder_cannot_be_asked_for(folder):
    judge = ImageTemplates(folder)
    with pytest.raises(ValueError, match=r"unknown class 'bat'.*bar"):
        judge(images=[picture(*[None] * 4)], include=[[want("red-bat")]])


def test_wrong_settings(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown reduce 'al'.*all"):
        ImageTemplates(folder, reduce="al")
    with pytest.raises(ConfigError, match=r"must hold blank.png.*no PNG files"):
        ImageTemplates(str(tmp_path))
    Image.fromarray(BLANK).save(tmp_path / "blank.png")
    Image.fromarray(BLANK).save(tmp_path / "bar.png")
    with pytest.raises(ConfigError, match=r"bar.png is not '<colour>-<class>.png'"):
        ImageTemplates(str(tmp_path))
    (tmp_path / "bar.png").unlink()
    Image.fromarray(BLANK[:2]).save(tmp_path / "red-bar.png")
    with pytest.raises(ConfigError, match="differ in size"):
        ImageTemplates(str(tmp_path))
