"""The batch type: construction from plain tensors, selection, joining, errors."""

from dataclasses import dataclass

import pytest
import torch

from mmgrpo.core.trajectories import Trajectories


@dataclass(frozen=True)
class Names:
    """A payload: one name per row."""

    names: tuple

    def select(self, rows):
        return Names(tuple(self.names[i] for i in rows.tolist()))

    def to(self, device):
        return self

    @classmethod
    def cat(cls, parts):
        return cls(tuple(name for part in parts for name in part.names))


def batch(size=4, width=3, start=0, **fields):
    rows = torch.arange(start, start + size)
    grid = rows[:, None] * 10 + torch.arange(width)
    return Trajectories(
        group=rows // 2,
        mask=torch.ones(size, width).bool(),
        old_log_prob=-grid.float(),
        node=grid,
        rewards={"a": rows.float(), "b": -rows.float()},
        truncated=rows % 2 == 0,
        old_prediction=torch.zeros(size, width, 2),
        pairs=torch.tensor([[0, 1], [3, 2], [1, 3]]),
        payload=Names(tuple(f"row {i}" for i in rows.tolist())),
        **fields,
    )


def test_plain_tensors_are_enough():
    t = Trajectories(group=torch.zeros(2), mask=torch.ones(2, 3), reward=torch.tensor([1, 0]))
    assert len(t) == 2
    assert t.mask.dtype == torch.bool
    assert t.lengths.tolist() == [3, 3]
    assert t.decision_weight.tolist() == [[1] * 3] * 2


def test_the_weight_counts_only_where_the_mask_is_on():
    t = Trajectories(
        group=torch.zeros(1), mask=torch.tensor([[1, 0]]), weight=torch.tensor([[0.5, 7.0]])
    )
    assert t.decision_weight.tolist() == [[0.5, 0]]


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])])
def test_selected_rows_keep_everything_that_belongs_to_them(rows):
    t = batch()
    found = t.select(rows)
    order = [3, 1] if rows.dtype == torch.int64 else [1, 3]
    assert found.group.tolist() == [t.group[i] for i in order]
    assert torch.equal(found.old_log_prob, t.old_log_prob[order])
    assert torch.equal(found.node, t.node[order])
    assert torch.equal(found.rewards["b"], t.rewards["b"][order])
    assert torch.equal(found.truncated, t.truncated[order])
    assert found.old_prediction.shape == (2, 3, 2)
    assert found.payload.names == tuple(f"row {i}" for i in order)
    assert [[order[i] for i in pair] for pair in found.pairs.tolist()] == [[1, 3]]
    assert found.ref_log_prob is None


def test_selecting_and_joining_gives_the_batch_back():
    t = batch()
    parts = [t.select(torch.tensor([0, 1])), t.select(torch.tensor([2, 3]))]
    found = Trajectories.cat(parts)
    for name in ("group", "mask", "old_log_prob", "node", "truncated", "old_prediction"):
        assert torch.equal(getattr(found, name), getattr(t, name))
    assert torch.equal(found.rewards["a"], t.rewards["a"])
    assert found.payload == t.payload
    assert found.pairs.tolist() == [[0, 1], [3, 2]]


def test_joining_pads_shorter_rollouts_on_the_right_with_untrained_decisions():
    found = Trajectories.cat([batch(width=2), batch(size=5, width=4, start=4)])
    assert found.mask.shape == (9, 4)
    assert found.lengths.tolist() == [2] * 4 + [4] * 5
    assert found.old_log_prob[0].tolist() == [0, -1, 0, 0]
    assert found.old_prediction.shape == (9, 4, 2)
    assert found.pairs.tolist() == [[0, 1], [3, 2], [1, 3], [4, 5], [7, 6], [5, 7]]


def test_joining_one_rollout_is_that_rollout():
    t = batch()
    assert Trajectories.cat([t]) is t


def test_joining_rollouts_that_carry_different_fields_is_refused():
    with pytest.raises(ValueError, match="ref_log_prob"):
        Trajectories.cat([batch(), batch(ref_log_prob=torch.zeros(4, 3))])
    with pytest.raises(ValueError, match="ref_log_prob"):
        Trajectories.cat([batch(ref_log_prob=torch.zeros(4, 3)), batch()])


def test_moving_keeps_values_and_structure():
    t = batch().to(torch.device("cpu"))
    assert torch.equal(t.old_log_prob, batch().old_log_prob)
    assert t.payload == batch().payload
    assert set(t.rewards) == {"a", "b"}


def test_replacing_leaves_the_original_alone():
    t = batch()
    assert t.replace(reward=torch.zeros(4)).reward is not None
    assert t.reward is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mask": torch.ones(2)}, "mask"),
        ({"group": torch.zeros(3)}, "group"),
        ({"advantage": torch.zeros(2)}, "advantage"),
        ({"old_log_prob": torch.zeros(2, 4)}, "old_log_prob"),
        ({"old_prediction": torch.zeros(2, 2, 3)}, "old_prediction"),
        ({"reward": torch.zeros(3)}, "reward"),
        ({"rewards": {"accuracy": torch.zeros(2, 1)}}, "accuracy"),
        ({"truncated": torch.zeros(1).bool()}, "truncated"),
    ],
)
def test_shapes_that_do_not_fit_are_named(fields, named):
    plain = {"group": torch.zeros(2), "mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=named):
        Trajectories(**{**plain, **fields})
