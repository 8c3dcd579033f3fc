"""The progress bar on a terminal, and single lines elsewhere."""

import io
import re

import pytest

from mmgrpo.tracking import Console, console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_a_line_now_and_then(clock):
    out = io.StringIO()
    shown = Console(total_steps=100, file=out, every_s=10)
    for step in range(1, 101):
        clock[0] += 1
        shown.log({"reward/mean": step / 100}, step)
    shown.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "train step 1/100  reward 0.010"
    assert lines[1] == "train step 11/100  reward 0.110  1:29 left"
    assert lines[-1] == "train step 100/100  reward 1.000"
    assert len(lines) == 11
    assert "\x1b" not in out.getvalue()


def test_evaluations_are_always_shown_and_success_stays(clock):
    out = io.StringIO()
    shown = Console(total_steps=9, file=out, title="text")
    shown.log({"eval/success": 0.25}, 0)
    shown.log({"reward/mean": 0.5}, 1)
    clock[0] += 60
    shown.log({"reward/mean": float("nan")}, 2)
    shown.log({"reward/mean": 0.75, "eval/success": 0.5}, 3)
    lines = out.getvalue().splitlines()
    assert lines[0] == "text step 0/9  success 0.250"
    assert lines[1].startswith("text step 2/9  success 0.250  reward 0.500")
    assert lines[2].startswith("text step 3/9  success 0.500  reward 0.750")


def test_the_time_left_counts_from_where_a_resumed_run_starts(clock):
    out = io.StringIO()
    shown = Console(total_steps=1000, file=out, every_s=0)
    shown.log({}, 900)
    clock[0] += 20
    shown.log({}, 910)
    assert out.getvalue().splitlines()[1] == "train step 910/1000  3:00 left"


def test_a_terminal_gets_a_live_bar():
    out = Terminal()
    shown = Console(total_steps=20, file=out)
    for step in range(1, 21):
        shown.log({"reward/mean": step / 20, "eval/success": 0.5}, step)
    shown.close()
    shown.close()
    assert "20/20" in plain(out.getvalue())
    assert "reward 1.000" in plain(out.getvalue())
    assert "success 0.500" in plain(out.getvalue())


def test_hours():
    assert console._duration(3661.4) == "1:01:01"
