"""Rewards on text: right, wrong, unparseable, not applicable, and references we cannot read."""

import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo.rewards.exact_answer import exact_answer
from mmgrpo.rewards.length_penalty import LengthPenalty
from mmgrpo.rewards.math_answer import math_answer
from mmgrpo.rewards.multiple_choice import multiple_choice
from mmgrpo.rewards.numeric_tolerance import numeric_tolerance
from mmgrpo.rewards.tag_format import tag_format
from mmgrpo.rewards.text import (
    as_number,
    find_answer,
    last_boxed,
    last_number,
    last_tag,
    text_of,
)


def chat(text):
    return [{"role": "assistant", "content": text}]


def one(reward, completion, answer, **options):
    (value,) = reward(completions=[completion], answer=[answer], **options)
    return value


# -- finding the answer --------------------------------------------------------------------------


def test_text_of_strings_chats_and_parts():
    assert text_of("a") == "a"
    assert text_of(chat("a")) == "a"
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]) == "a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> 4 </answer>", "4"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("<answer>4", None),
        ("4</answer>", None),
        ("</answer><answer>", None),
        ("<answer>a\nb</answer> then", "a\nb"),
        ("4", None),
    ],
)
def test_last_tag(text, expected):
    assert last_tag(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2}.", "2"),
        (r"\boxed{1", None),
        (r"boxed 1", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1, 2 and 3.", "3"),
        ("it costs 1,234.50 dollars", "1,234.50"),
        ("10-3", "3"),
        ("is -3", "-3"),
        ("is \N{MINUS SIGN}3", "-3"),
        ("(4)-1", "1"),
        ("version 2e3", "2e3"),
        ("12,3456", "3456"),
        (".5", ".5"),
        ("none", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


@given(st.fractions(max_denominator=1000, min_value=-(10**6), max_value=10**6))
def test_numbers_are_read_exactly(value):
    assert as_number(f"{value.numerator}/{value.denominator}") == value
    assert as_number(f"{value.numerator:,}") == value.numerator
    assert as_number(str(float(value))) == Fraction(str(float(value)))


@pytest.mark.parametrize("text", ["", "x", "1 2", "1/0", "1/2/3", "--1", "1,2", "nan", "inf"])
def test_what_is_no_number(text):
    assert as_number(text) is None


def test_the_answer_is_the_tag_then_the_box_then_the_last_number():
    assert find_answer(r"<answer>a</answer> \boxed{b} 3") == "a"
    assert find_answer(r"\boxed{b} 3") == "b"
    assert find_answer("so 2 or 3") == "3"
    assert find_answer(r"\boxed{b} 3", "answer") is None
    assert find_answer("<answer></answer> 3") == ""
    with pytest.raises(KeyError):
        find_answer("3", "last")


# -- math_answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("<think>6*7=42</think><answer>42</answer>", "42", 1.0),
        ("<answer>41</answer>", "42", 0.0),
        ("<answer>42.</answer>", "42", 1.0),
        ("<answer>$42$</answer>", 42, 1.0),
        ("<answer>x = 42</answer>", "42", 1.0),
        ("<answer>42 dollars</answer>", "42", 1.0),
        ("<answer>042.0</answer>", "42", 1.0),
        ("<answer>1,234</answer>", "1234", 1.0),
        ("the total is 42", "42", 1.0),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{1/2}", "0.5", 1.0),
        (r"\boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        (r"\boxed{1+x^2}", "x^2+1", 1.0),
        (r"\boxed{x^2}", "x^2+1", 0.0),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1.0),
        (r"\boxed{(1,2)}", "(2,1)", 0.0),
        ("<answer>-7</answer>", "7", 0.0),
        (r"so \boxed{3}", r"thus \boxed{3}", 1.0),
        ("<answer>1200</answer>", "600 * 2 = <<600*2=1200>>\n#### 1,200", 1.0),
        ("<answer>600</answer>", "600 * 2 = <<600*2=1200>>\n#### 1,200", 0.0),
        ("", "42", 0.0),
        ("no idea", "42", 0.0),
        ("<answer></answer> 42", "42", 0.0),
        (r"<answer>\frac{</answer>", "42", 0.0),
        ("<answer>}{</answer>", "42", 0.0),
        ("<answer>" + "(" * 150 + "</answer>", "42", 0.0),
        (r"\boxed{[0,1)}", "[0,1)", 1.0),
        (r"\boxed{[0,1)}", "[0,1]", 0.0),
    ],
)
def test_math_answers(completion, answer, expected):
    assert one(math_answer, completion, answer) == expected
    assert one(math_answer, chat(completion), answer) == expected


@pytest.mark.parametrize(
    "copied", ["60+99-44", "6*7", r"6\cdot 7", "84/2", r"\frac{84}{2}", "43-1", "41 or 42", "42 43"]
)
def test_copying_the_question_or_hedging_does_not_score(copied):
    value = "115" if copied == "60+99-44" else "42"
    assert one(math_answer, f"<answer>{copied}</answer>", value) == 0.0


def test_expressions_can_be_allowed():
    assert one(math_answer, "<answer>6*7</answer>", "42", expressions=True) == 1.0


BABBLE = ["(" * 150, "((12" * 20, "<think>{" * 20, "}{{" * 60, "9" * 201]


@pytest.mark.parametrize("answer", ["42", r"\sqrt{2}"])
@pytest.mark.parametrize("babble", BABBLE)
def test_babble_never_reaches_the_slow_parser(monkeypatch, babble, answer):
    parsed = []
    module = sys.modules["mmgrpo.rewards.math_answer"]
    monkeypatch.setattr(module, "_parse", lambda text, _: parsed.append(text) or [1])
    assert one(math_answer, f"<answer>{babble}</answer>", answer) == 0.0
    assert one(math_answer, "<answer>no digits</answer>", "42") == 0.0
    assert set(parsed) <= {answer}


def test_a_tower_of_powers_is_not_computed(monkeypatch):
    module = sys.modules["mmgrpo.rewards.math_answer"]
    monkeypatch.setattr(module, "_parse", lambda text, _: pytest.fail(text))
    assert one(math_answer, "<answer>9^{9^{9^9}}</answer>", "42") == 0.0


def test_math_answers_compare_in_a_thread_too():
    values = []
    thread = threading.Thread(
        target=lambda: values.extend(math_answer([r"\boxed{2\sqrt{2}}"], [r"\sqrt{8}"]))
    )
    thread.start()
    thread.join()
    assert values == [1.0]


@pytest.mark.parametrize("answer", ["", "  ", "$$"])
def test_an_unreadable_reference_is_our_failure(answer):
    with pytest.raises(ValueError, match="reference answer"):
        one(math_answer, "<answer>42</answer>", answer)


@pytest.mark.parametrize("reward", [math_answer, exact_answer, numeric_tolerance, multiple_choice])
def test_a_null_reference_is_not_applicable(reward):
    assert reward(completions=["<answer>B</answer>", "x"], answer=[None, None]) == [None, None]


@pytest.mark.parametrize("reward", [math_answer, exact_answer, numeric_tolerance, multiple_choice])
def test_a_shorter_column_is_our_failure(reward):
    with pytest.raises(ValueError, match="shorter"):
        reward(completions=["<answer>1</answer>"] * 2, answer=[1])


# -- exact_answer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("<answer>New  york.</answer>", "new York", 1.0),
        ("<answer>Paris</answer>", "London", 0.0),
        ("<answer>115</answer>", 115, 1.0),
        ("<answer>115.0</answer>", "115", 0.0),
        ("<answer>\N{FULLWIDTH DIGIT SEVEN}</answer>", "7", 1.0),
        ("<answer></answer>", "7", 0.0),
        ("7", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_exact_answers(completion, answer, expected):
    assert one(exact_answer, completion, answer) == expected


def test_exact_answer_options():
    assert one(exact_answer, "<a>x</a>", "x", tag="a") == 1.0
    assert one(exact_answer, "<answer>X</answer>", "x", case_sensitive=True) == 0.0
    with pytest.raises(ValueError, match="empty"):
        one(exact_answer, "<answer></answer>", " . ")


# -- tag_format ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a\nb</think><answer>c</answer>", 1.0),
        (" <think></think>\n<answer>c</answer>\n", 1.0),
        ("<think>a</think> so <answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer> bye", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<answer>c</answer>", 0.0),
        ("<answer>c</answer><think>a</think>", 0.0),
        ("<think>a<think>b</think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b<think></answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tag_format(completion, expected):
    assert tag_format([completion, chat(completion)]) == [expected, expected]


def test_tag_format_options():
    assert tag_format(["a</think><answer>c</answer>"], opened=True) == [1.0]
    assert tag_format(["<think>a</think><answer>c</answer>"], opened=True) == [0.0]
    assert tag_format(["<r>a</r><s>c</s>"], think="r", answer="s") == [1.0]


def test_tag_format_is_linear_in_hostile_text():
    start = time.perf_counter()
    tag_format(["<think>" * 20000, "<think>" + "<" * 200000, "<think></think>" + " " * 200000])
    assert time.perf_counter() - start < 5.0


# -- numeric_tolerance ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("<answer>101</answer>", {}, 1.0),
        ("<answer>99</answer>", {}, 1.0),
        ("<answer>101.01</answer>", {}, 0.0),
        ("<answer>about 100 m</answer>", {}, 1.0),
        ("<answer>99 or 100</answer>", {}, 0.0),
        ("<answer>200/2</answer>", {}, 1.0),
        ("<answer>many</answer>", {}, 0.0),
        ("", {}, 0.0),
        ("<answer>103</answer>", {"absolute": 3}, 1.0),
        ("<answer>103.5</answer>", {"absolute": 3}, 0.0),
        ("<answer>100.5</answer>", {"relative": 0.0}, 0.0),
        ("so 100", {"extract": "answer"}, 0.0),
    ],
)
def test_numeric_tolerance(completion, options, expected):
    assert one(numeric_tolerance, completion, "100", **options) == expected


def test_a_reference_that_is_no_number_is_our_failure():
    with pytest.raises(ValueError, match="'ten' is not a number"):
        one(numeric_tolerance, "<answer>10</answer>", "ten")


# -- multiple_choice -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>B</answer>", 1.0),
        ("<answer>(b)</answer>", 1.0),
        ("<answer>B. A dog</answer>", 1.0),
        ("<answer>**B**</answer>", 1.0),
        ("<answer>the option B</answer>", 1.0),
        (r"\boxed{B}", 1.0),
        ("I think the answer is B.", 1.0),
        ("The answer is A. No, the answer is (B)", 1.0),
        ("B) a dog", 1.0),
        ("<answer>A</answer>", 0.0),
        ("<answer>A or B</answer>", 0.0),
        ("<answer>a dog</answer>", 0.0),
        ("<answer></answer> B.", 0.0),
        ("I like B vitamins", 0.0),
        ("Because", 0.0),
        ("", 0.0),
    ],
)
def test_multiple_choice(completion, expected):
    assert multiple_choice([completion] * 3, ["B", "(b)", 1]) == [expected] * 3


@pytest.mark.parametrize("answer", ["K", "AB", "", 10, -1])
def test_a_reference_that_is_no_choice_is_our_failure(answer):
    with pytest.raises(ValueError, match="reference answer"):
        one(multiple_choice, "<answer>B</answer>", answer)


# -- length_penalty ------------------------------------------------------------------------------


def test_length_penalty_is_equation_13():
    def reference(length, limit, buffer):
        if length <= limit - buffer:
            return 0.0
        if length <= limit:
            return (limit - buffer - length) / buffer
        return -1.0

    penalty = LengthPenalty(max_length=20, buffer=8)
    lengths = list(range(30))
    assert penalty(lengths=lengths) == pytest.approx(
        [reference(n, 20, 8) for n in lengths], abs=1e-12
    )


@pytest.mark.parametrize(("limit", "buffer"), [(10, 0), (10, 11), (10, -1)])
def test_length_penalty_needs_a_buffer_inside_the_limit(limit, buffer):
    with pytest.raises(ValueError, match="buffer"):
        LengthPenalty(limit, buffer)


def test_without_a_tag_the_whole_completion_is_the_answer():
    found = exact_answer(
        completions=[" 42.", "<answer>42</answer>", ""], answer=["42"] * 3, tag=None
    )
    assert found == [1.0, 0.0, 0.0]
