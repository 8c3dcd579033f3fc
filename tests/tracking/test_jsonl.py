"""metrics.jsonl: valid JSON, whole lines, and exact after a crash and a resume."""

import json
import math
import os

import numpy as np
import pytest
import torch

from mmgrpo.errors import DataError
from mmgrpo.tracking import JsonlTracker, read_metrics


def tracker(tmp_path, steps=0):
    tracker = JsonlTracker(tmp_path / "run" / "metrics.jsonl")
    for step in range(1, steps + 1):
        tracker.log({"reward/mean": step / 10}, step)
    return tracker


def test_one_object_per_step_on_disk_at_once(tmp_path):
    tracked = tracker(tmp_path)
    for step in range(3):
        tracked.log({"loss": 0.1 + 0.2, "n": 3}, step)
        rows = [json.loads(line) for line in tracked.path.read_text().splitlines()]
        assert rows == [{"step": s, "loss": 0.1 + 0.2, "n": 3} for s in range(step + 1)]


def test_floats_are_finite_json(tmp_path):
    tracked = tracker(tmp_path)
    tracked.log(
        {
            "a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf), "d": torch.tensor(0.5),
            "e": np.float64(0.25), "f": np.int64(3), "g": True, "h": "text", "i": None, "step": 7,
        },
        7,
    )  # fmt: skip
    row = json.loads(tracked.path.read_text(), parse_constant=pytest.fail)
    assert row == {
        "step": 7, "a": None, "b": None, "c": None, "d": 0.5, "e": 0.25, "f": 3, "g": True,
        "h": "text", "i": None,
    }  # fmt: skip


def test_each_line_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    tracker(tmp_path, steps=3)
    assert len(synced) == 3


@pytest.mark.parametrize("step", [0, 1, 3, 9])
def test_truncation_keeps_earlier_lines_byte_for_byte(tmp_path, step):
    tracked = tracker(tmp_path, steps=4)
    lines = tracked.path.read_bytes().splitlines(keepends=True)
    tracked.truncate_after(step)
    assert tracked.path.read_bytes() == b"".join(lines[:step])
    tracked.log({"x": 1}, step + 1)
    assert [row["step"] for row in read_metrics(tracked.path)] == [
        *range(1, min(step, 4) + 1),
        step + 1,
    ]
    assert [p.name for p in tracked.path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_last_line_is_dropped(tmp_path, cut):
    tracked = tracker(tmp_path, steps=3)
    whole = tracked.path.read_bytes()
    tracked.path.write_bytes(whole[:-cut])
    assert [row["step"] for row in read_metrics(tracked.path)] == [1, 2]
    tracked.truncate_after(2)
    tracked.log({"reward/mean": 0.3}, 3)
    assert tracked.path.read_bytes() == whole


def test_logging_after_a_crash_never_joins_lines(tmp_path):
    tracked = tracker(tmp_path, steps=2)
    with tracked.path.open("ab") as stream:
        stream.write(b'{"step": 3, "los')
    tracked.log({"a": 1}, 3)
    assert [row["step"] for row in read_metrics(tracked.path)] == [1, 2, 3]


def test_a_long_half_line_in_an_otherwise_empty_file(tmp_path):
    tracked = tracker(tmp_path)
    tracked.path.write_bytes(b"x" * 10000)
    tracked.log({}, 1)
    assert tracked.path.read_text() == '{"step": 1}\n'


def test_a_long_half_line_after_whole_ones(tmp_path):
    tracked = tracker(tmp_path, steps=1)
    whole = tracked.path.read_bytes()
    tracked.path.write_bytes(whole + b"x" * 9000)
    tracked.log({}, 2)
    assert tracked.path.read_bytes() == whole + b'{"step": 2}\n'


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    tracked = tracker(tmp_path, steps=2)
    before = tracked.path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        tracked.log({"a": 1}, 3)
    assert tracked.path.read_bytes() == before


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_garbage_in_the_middle_is_named(tmp_path, line):
    tracked = tracker(tmp_path)
    tracked.path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: expected"):
        tracked.truncate_after(1)


def test_truncating_nothing(tmp_path):
    tracker(tmp_path).truncate_after(3)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
