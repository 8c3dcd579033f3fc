"""External trackers get finite numbers only, and a missing package is one sentence."""

import math
import sys

import pytest

from mmgrpo.errors import MissingExtraError
from mmgrpo.tracking import external


class Recorder:
    def __init__(self):
        self.calls = []

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


def test_only_finite_numbers_are_sent():
    recorder = Recorder()
    tracker = external.ExternalTracker(recorder)
    tracker.log({"step": 3, "a": 0.5, "b": math.nan, "c": math.inf, "d": "x", "e": None, "f": 2}, 3)
    tracker.truncate_after(1)
    tracker.close()
    assert recorder.calls == [(3, {"a": 0.5, "f": 2}), "finish"]


def test_tensorboard_writes_what_is_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"seed": 1, "model": {"path": "x", "lora": None}, "rewards": [{"name": "r"}]}
    tracker = external.tensorboard(tmp_path, config)
    tracker.log({"reward/mean": 0.5, "kl": math.nan}, 1)
    tracker.log({"reward/mean": 0.75}, 2)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.75)]
    assert "kl" not in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()  # a folder of that name is not the package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*mmgrpo\[tracking\]"):
        getattr(external, name)(tmp_path, {})


def test_settings_are_flat():
    flat = external.flatten({"a": 1, "b": {"c": None, "d": {"e": True}}, "f": [1, 2], "g": 0.5})
    assert flat == {"a": 1, "b.c": "None", "b.d.e": True, "f": "[1, 2]", "g": 0.5}
