"""An update without its idle rows: the same gradient and metrics that make sense, fewer calls."""

import pytest
import torch
from test_split_invariance import distance, gradient, policies, prepared  # noqa: F401

from mmgrpo.trainer import step as step_module


@pytest.mark.parametrize("preset", ["dr-grpo", "gspo", "cispo", "grpo"])
def test_idle_rows_change_neither_gradient_nor_loss(
    policies, models, tmp_path, monkeypatch, preset  # noqa: F811
):  # fmt: skip
    parts, config, trajectories = prepared(
        policies, models, "text", preset, tmp_path, trainer={"max_grad_norm": None}
    )
    trajectories.advantage[1:-1:2] = 0.0
    found, metrics = gradient(parts, config, trajectories, 1)
    monkeypatch.setattr(step_module, "without_idle", lambda batch, method, total: batch)
    whole, expected = gradient(parts, config, trajectories, 1)
    assert distance(found, whole) < 1e-5
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    fewer = metrics["count/forward"] < expected["count/forward"]
    assert fewer == (preset != "grpo")  # its KL term needs every row
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=0.2)


def test_an_update_of_idle_rows_only_still_counts(policies, models, tmp_path):  # noqa: F811
    parts, config, trajectories = prepared(policies, models, "text", "dr-grpo", tmp_path)
    trajectories = trajectories.replace(advantage=torch.zeros_like(trajectories.advantage))
    found, metrics = gradient(parts, config, trajectories, None)
    assert not found.any()
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=0.2)
