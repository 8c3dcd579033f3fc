"""Any split into micro-batches or ranks gives the update of the whole batch, for every preset."""

import pytest
import torch
from method_batches import (
    PRESETS,
    VARIANTS,
    load_variant,
    loss_and_gradient,
    make_batch,
    relative_error,
    run_ranks,
    select,
)

from mmgrpo.core import denominators

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def partition(group, seed, *, whole_groups):
    """A random partition of the rows, or of the groups, into micro-batches, in random order."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.unique(group) if whole_groups else torch.arange(len(group))
    order = units[torch.randperm(len(units), generator=generator)]
    cuts = torch.randperm(len(units) - 1, generator=generator)[: seed % 5 + 1].sort().values + 1
    parts = order.tensor_split(cuts.tolist())
    if not whole_groups:
        return parts
    return [torch.isin(group, part).nonzero().squeeze(1) for part in parts]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_micro_batches_sum_to_the_whole(name, seed, dtype):
    method, batch = load_variant(name), make_batch(seed, dtype, alone=True)
    prepared = method.prepare(batch.trajectories)
    total = denominators(prepared)
    whole, wanted = loss_and_gradient(method, batch, prepared, total)
    found, loss, metrics = torch.zeros_like(wanted), 0.0, dict.fromkeys(whole.metrics, 0.0)
    whole_groups = "whole_groups" in method.needs
    for rows in partition(prepared.group, seed, whole_groups=whole_groups):
        share, gradient = loss_and_gradient(
            method, select(batch, rows), prepared.select(rows), total
        )
        found[rows] += gradient
        loss += share.loss.item()
        metrics = {key: metrics[key] + value for key, value in share.metrics.items()}
    assert relative_error(found, wanted) < TOLERANCE[dtype]
    assert loss == pytest.approx(whole.loss.item(), rel=10 * TOLERANCE[dtype], abs=1e-6)
    assert metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-6)
    alone, gradient = loss_and_gradient(method, batch, prepared)
    assert torch.equal(gradient, wanted)
    assert alone.loss == whole.loss


def by_groups(batch, *parts):
    """The batch cut between groups; each part lists the positions of its groups."""
    ids = torch.unique_consecutive(batch.trajectories.group)
    return [torch.isin(batch.trajectories.group, ids[list(p)]).nonzero().squeeze(1) for p in parts]


@pytest.mark.parametrize(
    "parts",
    [([0, 3], [1, 2, 4, 5]), ([2], [0, 1, 3, 4, 5]), ([0], [1, 2], [3, 4, 5])],
    ids=["uneven", "a rank whose only group is uniform", "three"],
)
@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_ranks_give_what_one_process_gives(name, parts):
    method, batch = load_variant(name), make_batch(3, alone=True)
    prepared = method.prepare(batch.trajectories)
    total = denominators(prepared)
    whole, wanted = loss_and_gradient(method, batch, prepared, total)
    rows_of = by_groups(batch, *parts)
    found, loss = torch.zeros_like(wanted), 0.0
    for rows, result in zip(
        rows_of, run_ranks(method, [select(batch, rows) for rows in rows_of]), strict=True
    ):
        mine, its_total, output, gradient = result
        torch.testing.assert_close(mine.advantage, prepared.advantage[rows], rtol=1e-10, atol=1e-12)
        assert torch.equal(mine.mask, prepared.mask[rows])
        assert (its_total.sequences, its_total.decisions) == (total.sequences, total.decisions)
        found[rows] += gradient
        loss += output.loss.item()
    assert relative_error(found, wanted) < 1e-10
    assert loss == pytest.approx(whole.loss.item(), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_the_order_of_the_samples_does_not_matter(name):
    method, batch = load_variant(name), make_batch(4, alone=True)
    order = torch.randperm(len(batch.trajectories), generator=torch.Generator().manual_seed(1))
    plain, gradient = loss_and_gradient(method, batch)
    moved, found = loss_and_gradient(method, select(batch, order))
    assert relative_error(found, gradient[order]) < 1e-10
    assert moved.loss.item() == pytest.approx(plain.loss.item(), rel=1e-10, abs=1e-13)
