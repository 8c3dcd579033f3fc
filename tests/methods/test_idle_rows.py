"""Rows without advantage cost no forward pass where no term of the method feels them."""

import dataclasses

import pytest
import torch
from method_batches import (
    PRESETS,
    VARIANTS,
    load_variant,
    loss_and_gradient,
    make_batch,
    relative_error,
    select,
)

from mmgrpo.core import denominators
from mmgrpo.trainer.batches import without_idle


def prepared(name, idle=slice(0, 4)):
    """A batch, some rows of which have no advantage; the rows are numbered by ``variant``."""
    method, batch = load_variant(name), make_batch(5)
    found = method.prepare(batch.trajectories)
    found.advantage[idle] = 0.0
    changes = {"variant": torch.arange(len(found))}
    if method.request.divergence:
        changes["step_std"] = torch.ones_like(found.advantage)
    known = {f.name for f in dataclasses.fields(found)}
    return method, batch, found.replace(**{k: v for k, v in changes.items() if k in known})


def pulls(method):
    """Whether a penalty, or a partner, holds every row."""
    options = method.regulariser
    entropy = options.entropy or options.entropy_control.targets
    penalty = options.kl.coefficient or options.drift or entropy
    return bool(penalty) or "pairs" in method.needs


@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_the_gradient_is_that_of_all_rows(name):
    method, batch, whole = prepared(name)
    total = denominators(whole)
    _, wanted = loss_and_gradient(method, batch, whole, total)
    fewer = without_idle(whole, method, total)
    rows = fewer.variant
    assert (len(rows) == len(whole)) == pulls(method)
    _, found = loss_and_gradient(method, select(batch, rows), fewer, total)
    again = torch.zeros_like(wanted)
    again[rows] = found
    assert relative_error(again, wanted) < 1e-12
    assert wanted.norm() > 0


@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_a_row_with_any_advantage_stays(name):
    method, _, whole = prepared(name)
    row, column = whole.mask.nonzero()[0]
    whole.advantage[row, column] = 1e-20
    assert row < 4
    assert row in without_idle(whole, method, denominators(whole)).variant


def test_nothing_left_is_one_row_without_decisions():
    method, _, whole = prepared("dapo", slice(None))
    fewer = without_idle(whole, method, denominators(whole))
    assert len(fewer) == 1
    assert not fewer.mask.any()


def test_an_objective_that_couples_rows_keeps_them():
    """Its residuals are measured from the mean of the group, which idle rows belong to."""
    _, _, whole = prepared("dapo")

    class Coupled:
        request = load_variant("dapo").request

        def loss(self, log_prob, trajectories, *, evaluation, total):
            count = trajectories.mask.any(dim=1).sum()
            value = (log_prob * trajectories.mask * trajectories.advantage).sum() / count
            return type("Output", (), {"loss": value})

    total = denominators(whole)
    assert len(without_idle(whole, Coupled(), total)) == len(whole)
