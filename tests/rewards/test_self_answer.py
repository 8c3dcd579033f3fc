"""The share of right answers about one's own picture."""

import pytest

from mmgrpo.rewards.self_answer import self_answer

PAIRS = [["which number?", "42"], ["left?", "4"], ["right?", "2"]]


def score(answers, pairs=PAIRS, **options):
    return self_answer([answers], [pairs], **options)[0]


def test_the_share_of_right_answers():
    assert score(("42", "4", "2")) == 1.0
    assert score(("42", "4", "7")) == pytest.approx(0.6667, abs=1e-4)  # the paper's case: 2 of 3
    assert score(("", "420", "24")) == 0.0


def test_space_and_case_do_not_count_unless_they_shall():
    assert score((" A cat \n",), [["what?", "a CAT"]]) == 1.0
    assert score((" A cat \n",), [["what?", "a CAT"]], case_sensitive=True) == 0.0
    assert score((" a CAT \n",), [["what?", "a CAT"]], case_sensitive=True) == 1.0


def test_a_row_without_questions_does_not_apply():
    assert self_answer([(), ("1",)], [None, [["?", 1]]]) == [None, 1.0]


def test_what_it_cannot_do_raises():
    with pytest.raises(ValueError, match=r"set rollout.ask_questions=true"):
        score(())
    with pytest.raises(ValueError, match="argument"):
        score(("42",))  # an answer to each question, or something is wrong
