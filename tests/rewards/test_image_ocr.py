"""The text reward: distances against brute force, and the real tesseract where it is installed."""

import functools
import shutil
import stat

import pytest
from contract import Case, check_contract
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from mmgrpo.errors import ConfigError, MissingResourceError
from mmgrpo.rewards.image_ocr import (
    SIMILARITIES,
    ImageOcr,
    contained_similarity,
    quoted,
    whole_similarity,
)

needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="tesseract is not installed"
)
WORDS = st.text("abc", max_size=6)


def sign(text, size=(320, 120), colour="black"):
    picture = Image.new("RGB", size, "white")
    font = ImageFont.load_default(size=36)
    ImageDraw.Draw(picture).multiline_text((20, 25), text, fill=colour, font=font)
    return picture


@functools.cache
def distance(a, b):
    """Levenshtein's recursion as it is defined."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@given(WORDS, WORDS.filter(bool))
def test_similarities_are_their_definitions(read, asked):
    expected = 1 - distance(read, asked) / max(len(read), len(asked))
    assert whole_similarity(read, asked) == pytest.approx(expected)
    parts = [read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)]
    expected = 1 - min(distance(part, asked) for part in parts) / len(asked)
    assert contained_similarity(read, asked) == pytest.approx(expected)
    edits = 0 if asked in parts else distance(read, asked)
    expected = 1 - min(edits, len(asked)) / len(asked)
    assert SIMILARITIES["edit"](read, asked) == pytest.approx(expected)
    assert SIMILARITIES["substring"](read, asked) == float(asked in parts)
    assert SIMILARITIES["exact"](read, asked) == float(distance(read, asked) == 0)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ("open", (1.0, 1.0, 1.0)),
        ("weareopennow", (1.0, 1.0, 0.0)),
        ("opan", (0.75, 0.0, 0.0)),
        ("closedtoday", (0.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0)),
    ],
)
def test_flow_grpos_score_and_the_strict_ones_by_hand(read, expected):
    names = ("edit", "substring", "exact")
    assert tuple(SIMILARITIES[name](read, "open") for name in names) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign "Open"', "Open"),
        ('"A" above "B c"', "A B c"),
        ("a sign \N{LEFT DOUBLE QUOTATION MARK}Open\N{RIGHT DOUBLE QUOTATION MARK}", "Open"),
        ([{"role": "user", "content": "it's a sign \"Don't\""}], "Don't"),
    ],
)
def test_quotations(prompt, expected):
    assert quoted(prompt) == expected


def test_a_prompt_without_quotation_is_our_failure():
    with pytest.raises(ValueError, match=r"no text in double quotes.*column 'text'"):
        quoted("a cat's 'meow'")


def test_a_missing_program_is_one_sentence_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = r"tesseract-ocr.*brew install tesseract"
    with pytest.raises(MissingResourceError, match=expected) as raised:
        ImageOcr()
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A program called tesseract that does as told when it reads."""

    def install(command):
        script = tmp_path / "tesseract"
        languages = 'if [ "$1" = "--list-langs" ]; then echo List; echo eng; exit 0; fi'
        script.write_text(f"#!/bin/sh\n{languages}\n/bin/cat > /dev/null\n{command}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


def test_a_program_that_fails_or_hangs_raises(stand_in):
    stand_in("echo broken image >&2; exit 3")
    with pytest.raises(RuntimeError, match="exit code 3: broken image"):
        ImageOcr()(images=[sign("A")], prompts=['"A"'])
    stand_in("exec /bin/sleep 5")
    with pytest.raises(TimeoutError, match=r"longer than 0\.2 s"):
        ImageOcr(timeout_s=0.2)(images=[sign("A")], prompts=['"A"'])


def test_what_is_compared(stand_in):
    stand_in("echo ' Open  24'; echo Hours")
    blank = [sign("")] * 3
    ocr = ImageOcr()
    assert ocr(images=blank, prompts=["x"] * 3, text=["open 24 hours", "OPEN", None]) == [
        1.0, pytest.approx(4 / 11), None,
    ]  # fmt: skip
    assert ImageOcr("contained")(images=blank[:1], prompts=["x"], text=["OPEN"]) == [1.0]
    kept = ImageOcr(case_sensitive=True)(images=blank[:1], prompts=["x"], text=["open24hours"])
    assert kept == [pytest.approx(9 / 11)]
    with pytest.raises(ValueError, match="is empty"):
        ocr(images=blank[:1], prompts=["x"], text=[" "])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "hole"}, "did you mean 'whole'"),
        ({"layout": 14}, "0 to 13; got 14"),
        ({"language": "eng+deu"}, "no language 'deu'.*tesseract-ocr-deu.*valid: eng"),
    ],
)
def test_bad_options(stand_in, options, message):
    stand_in("true")
    with pytest.raises(ConfigError, match=message):
        ImageOcr(**options)


@needs_tesseract
@pytest.mark.parametrize("colour", ["black", "red"])
def test_rendered_text_is_read(colour):
    texts = ["Hello world", "OPEN 24", "fresh bread\nevery day"]
    pictures = [sign(text, colour=colour) for text in texts]
    assert ImageOcr()(images=pictures, prompts=[f'"{text}"' for text in texts]) == [1.0] * 3


@needs_tesseract
def test_contract():
    pictures = [sign("Hello world"), sign("Halo wort"), sign(""), sign("Hello")]
    columns = {"prompts": ['a sign that says "Hello world"'] * 4}
    check_contract(Case(ImageOcr(), pictures, columns, low=0.0, high=1.0))
