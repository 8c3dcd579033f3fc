"""YAML without the traps of YAML 1.1, and nothing lost on the way out and in."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmgrpo.config.yaml_file import dump_yaml, parse_yaml
from mmgrpo.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("0x1f", 31),
        ("-7", -7),
        ("010", "010"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("True", True),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("-", [None]),
        (".inf", math.inf),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
    ],
)
def test_scalars_read_as_a_person_reads_them(text, value):
    read = parse_yaml(text, "x")[0]
    assert read == value
    assert type(read) is type(value)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(documents)
@example(["\x85", "a\u2028b", {"\u2029": None}])
def test_dump_and_parse_are_inverse(document):
    assert parse_yaml(dump_yaml(document), "x")[0] == document


@given(st.from_regex(r"[-+.0-9eExX_:onyfrtalsu~]{1,8}", fullmatch=True))
def test_strings_that_look_like_numbers_stay_strings(text):
    assert parse_yaml(dump_yaml({"a": text}), "x")[0] == {"a": text}


def test_every_key_and_item_knows_its_line():
    text = "a:\n  b: 1\n  c:\n    - x\n    - y: 2\n"
    assert parse_yaml(text, "x")[1] == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("a", "c", 1, "y"): 5,
    }


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yaml:3: not valid YAML: the key 'a' stands twice"),
        ("a: [1\n", "run.yaml:2: not valid YAML"),
        ("a: !!python/object:os.system x\n", "run.yaml:1: not valid YAML"),
        ("a: *b\n", "run.yaml:1: not valid YAML"),
        ("{[1]: 2}\n", "run.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not valid YAML"),
        ("a: \x00\n", "run.yaml: not valid YAML"),
    ],
)
def test_what_is_not_yaml_is_named_with_its_line(text, start):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "run.yaml")
    assert str(error.value).startswith(start)
    assert "\n" not in str(error.value)
