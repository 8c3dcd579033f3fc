"""How a rollout is cut: into rounds, minibatches and micro-batches. No cut changes the result.

Groups are numbered in the order in which the whole run draws them, whatever the number of ranks
(see :func:`mmgrpo.trainer.step.sample`), and every choice between groups is made from their
numbers. So N ranks make the choice that one would make.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgrpo.core.aggregation import Denominators
from mmgrpo.core.collective import Collective
from mmgrpo.core.credit import carried_once
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.protocols import Evaluation
from mmgrpo.trainer.parts import Collected, MethodLike


def choose_groups(
    collected: Collected, spread: Tensor, count: int, collective: Collective
) -> Collected:
    """Keep ``count`` groups over all ranks: those with spread first, in the order of the draw.

    Args:
        collected: everything that was sampled.
        spread: ``[B]`` bool, whether the sample's group has spread in its reward.
        count: groups to keep.
        collective: reaches the other ranks.
    """
    trajectories = collected.trajectories
    later = int(collective.gather(trajectories.group).max()) + 1
    place = torch.where(spread, trajectories.group, trajectories.group + later)
    kept = torch.unique(collective.gather(place))[:count]
    rows = torch.isin(place, kept).nonzero().squeeze(1)
    if len(rows) == 0:  # every rank has to take part in what follows
        rows = torch.zeros_like(trajectories.group[:1])
        rewards = {n: torch.full_like(r, torch.nan) for n, r in trajectories.rewards.items()}
        off = torch.zeros_like(trajectories.mask)
        trajectories = trajectories.replace(mask=off, rewards=rewards)
    return Collected(trajectories.select(rows), [collected.samples[i] for i in rows.tolist()])


def minibatches(group: Tensor, count: int, seed: int, collective: Collective) -> list[Tensor]:
    """Deal the groups of all ranks into ``count`` minibatches.

    Of ``count`` successive groups each goes to another minibatch, so that the ranks, which hold
    successive groups, get equal shares.

    Returns:
        The rows of this rank in each minibatch, in order; some may be empty.
    """
    ids = torch.unique(collective.gather(torch.unique(group)))
    rounds = -(-len(ids) // count)
    generator = torch.Generator().manual_seed(seed)
    deal = torch.rand(rounds, count, generator=generator).argsort(dim=1).flatten()
    part = deal.to(group.device)[torch.searchsorted(ids, group)]
    return [(part == i).nonzero().squeeze(1) for i in range(count)]


def micro_batches(
    trajectories: Trajectories,
    size: int | None,
    *,
    decisions: int | None = None,
    whole_groups: bool = False,
) -> Sequence[Tensor]:
    """Return the rows, cut into pieces (None for both limits: one piece).

    Args:
        trajectories: ``B`` rows.
        size: most rows of a piece.
        decisions: most rows of a piece times the decisions of its longest row.
        whole_groups: no group is cut: a piece is successive groups within the limits, or one group
            that exceeds them.
    """
    rows = torch.arange(len(trajectories), device=trajectories.group.device)
    if decisions is None and (size is None or not whole_groups):
        return rows.split(size or len(rows))
    place = torch.unique(trajectories.group, return_inverse=True)[1] if whole_groups else rows
    longest = (
        trajectories.mask * torch.arange(1, trajectories.mask.shape[1] + 1, device=rows.device)
    ).amax(dim=1)
    units: dict[int, list[int]] = {}
    for row, unit in enumerate(place.tolist()):
        units.setdefault(unit, []).append(row)
    widths = longest.tolist()
    pieces: list[list[int]] = [[]]
    width = 0
    for _, unit in sorted(units.items()):
        count, wider = len(pieces[-1]) + len(unit), max(width, *(widths[row] for row in unit))
        too_many = size is not None and count > size
        if pieces[-1] and (too_many or (decisions is not None and count * wider > decisions)):
            pieces.append([])
            wider = max(widths[row] for row in unit)
        pieces[-1] += unit
        width = wider
    return [rows[torch.tensor(sorted(piece), device=rows.device)] for piece in pieces]


def micro_batch_bounds(
    rows: int, width: int, size: int | None, *, decisions: int | None = None, group: int = 1
) -> tuple[int, int]:
    """Return what :func:`micro_batches` makes of full-length rows: rows in a piece, pieces.

    Shorter rows make larger pieces, never more of them.

    Args:
        rows: rows that are cut.
        width: most decisions of a row.
        size: see :func:`micro_batches`.
        decisions: see :func:`micro_batches`.
        group: rows that stay together.
    """
    most = min(size or rows, rows)
    if decisions is not None:
        most = min(most, decisions // width)
    most = min(rows, max(1, most // group) * group)
    return most, -(-rows // most)


def trained(trajectories: Trajectories, rows: Tensor) -> Trajectories:
    """Select those of ``rows`` that have decisions to train, or a row without any if none has.

    A row that is not trained costs nothing; but in a distributed update every rank takes part.
    """
    rows = rows[trajectories.mask[rows].any(dim=1)]
    if len(rows):
        return trajectories.select(rows)
    blank = trajectories.select(torch.zeros_like(trajectories.group[:1]))
    return blank.replace(mask=torch.zeros_like(blank.mask))


def without_idle(batch: Trajectories, method: MethodLike, total: Denominators) -> Trajectories:
    """Drop the rows whose advantage is zero everywhere, if the method's gradient is the same.

    Whether it is, is not declared by the method but tried out, on made-up log-probabilities: a KL
    or entropy term pulls on such rows, and so may an objective that couples rows.

    Args:
        batch: rows with decisions to train, and their advantages.
        method: the method.
        total: denominators of the whole update, with the dropped rows.

    Returns:
        The other rows; or one row without decisions if none is left.
    """
    idle = ((batch.advantage == 0) | ~batch.mask).all(dim=1)
    if method.request.prediction or not bool(idle.any()):
        return batch
    rows = (~idle).nonzero().squeeze(1)
    fewer, whole = trained(batch, rows), _pull(batch, method, total)
    if bool(whole[:, idle].any()):
        return batch
    same = len(rows) == 0 or torch.allclose(_pull(fewer, method, total, rows), whole[:, rows])
    return fewer if same else batch


def without_repeats(batch: Trajectories, method: MethodLike, *, cut: bool) -> Trajectories:
    """Leave a decision that rows share to one of them, where the batch is cut into pieces.

    Otherwise each piece would evaluate it. Only where the loss is a sum over decisions.
    """
    if not cut or batch.node is None or batch.rollout_log_prob is not None:
        return batch
    if not method.per_decision:
        return batch
    return trained(carried_once(batch), torch.arange(len(batch), device=batch.mask.device))


def _pull(
    batch: Trajectories, method: MethodLike, total: Denominators, rows: Tensor | None = None
) -> Tensor:
    """``[3, B, T]`` gradient of the loss in an evaluation's numbers, at values near the old policy.

    ``rows`` are the places of the batch's rows among those that get different values.
    """
    place = torch.arange(len(batch), device=batch.mask.device) if rows is None else rows
    width = batch.mask.shape[1]
    wave = torch.sin(1.0 + place[:, None] * width + torch.arange(width, device=place.device))
    old = torch.zeros_like(wave) if batch.old_log_prob is None else batch.old_log_prob
    made_up = (old + 0.1 * wave, 1.0 + 0.1 * wave, 0.1 + 0.05 * wave)
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in made_up]
        loss = method.loss(
            leaves[0], batch.replace(payload=None), evaluation=Evaluation(*leaves), total=total
        ).loss
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return torch.stack([gradient.to(wave.dtype) for gradient in found])
