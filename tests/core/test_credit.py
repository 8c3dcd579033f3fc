"""Credit: how an advantage spreads over decisions, and decisions that several rows share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo.core.credit import carried_once, node_mean, node_weight, reward_to_go, uniform
from mmgrpo.core.trajectories import Trajectories


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


def batch(mask=MASK, group=None, **fields):
    group = torch.zeros(len(mask), dtype=torch.int64) if group is None else torch.tensor(group)
    return Trajectories(group=group, mask=mask, **fields)


def test_uniform_credit_fills_the_mask_only():
    found = uniform(tensor([2, -1, 5]), batch())
    assert found.tolist() == [[2, 2, 0, 2, 0], [0, -1, -1, 0, 0], [0, 0, 0, 0, 0]]


def test_reward_to_go_discounts_over_trained_decisions():
    found = reward_to_go(tensor([8, 4, 1]), batch(), gamma=0.5)
    assert found.tolist() == [[2, 4, 0, 8, 0], [0, 2, 4, 0, 0], [0, 0, 0, 0, 0]]


def test_reward_to_go_without_step_rewards_and_discount_is_uniform():
    a = tensor([2, -1, 5])
    torch.testing.assert_close(reward_to_go(a, batch()), uniform(a, batch()))


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.9, 0.0]))
def test_reward_to_go_against_the_double_sum(seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 6, generator=generator) < 0.6
    steps = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    a = torch.randn(3, generator=generator, dtype=torch.float64)
    found = reward_to_go(a, batch(mask, step_reward=steps), gamma=gamma)
    for i in range(3):
        places = mask[i].nonzero().flatten().tolist()
        earned = [steps[i, t].item() for t in places]
        if earned:
            earned[-1] += a[i].item()
        for k, t in enumerate(places):
            exact = sum(gamma ** (u - k) * earned[u] for u in range(k, len(places)))
            assert found[i, t].item() == pytest.approx(exact, abs=1e-9)
    assert (found[~mask] == 0).all()


def test_garbage_in_step_rewards_off_the_mask_is_never_read():
    steps = torch.where(MASK, tensor(0.5), tensor(math.nan))
    found = reward_to_go(tensor([1, 1, 1]), batch(step_reward=steps))
    assert found.tolist() == [[2.5, 2, 0, 1.5, 0], [0, 2, 1.5, 0, 0], [0, 0, 0, 0, 0]]


TREE = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 5]])
"""Three rows: all share the first decision, two of them the second."""


def test_shared_decisions_carry_the_mean_and_count_once():
    mask = torch.ones(3, 3).bool()
    t = batch(mask, node=TREE)
    found = node_mean(uniform(tensor([3, 0, -6]), t), t)
    assert found.tolist() == [[-1, 1.5, 3], [-1, 1.5, 0], [-1, -6, -6]]
    third = 1 / 3
    weight = node_weight(t, torch.float64)
    assert weight.flatten().tolist() == pytest.approx([third, 0.5, 1, third, 0.5, 1, third, 1, 1])
    assert weight.sum().item() == pytest.approx(6)  # six different decisions


def test_masked_out_copies_do_not_count():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    t = batch(mask, node=TREE)
    value = torch.where(mask, uniform(tensor([3, 0, -6]), t), tensor(math.nan))
    assert node_mean(value, t).tolist() == [[0, 1.5, 3], [-3, 1.5, 0], [-3, -6, 0]]
    assert node_weight(t).tolist() == [[0, 0.5, 1], [0.5, 0.5, 1], [0.5, 1, 0]]


def test_equal_node_ids_in_different_groups_are_different_decisions():
    t = batch(torch.ones(2, 2).bool(), group=[4, 9], node=torch.tensor([[0, 1], [0, 1]]))
    assert node_weight(t).tolist() == [[1, 1], [1, 1]]


def test_without_node_ids_every_decision_is_its_own():
    assert torch.equal(node_weight(batch()), MASK.float())
    with pytest.raises(ValueError, match="node"):
        node_mean(torch.zeros(3, 5), batch())


def test_a_shared_decision_can_be_carried_by_its_first_row():
    node = torch.tensor([[0, 1, 5], [0, 2, 6], [0, 1, 7], [0, 1, 8]])
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 1] = False
    weight = torch.tensor([[0.25, 9, 1], [0.25, 1, 1], [0.25, 0.5, 1], [0.25, 0.5, 0]])
    t = Trajectories(group=torch.tensor([0, 0, 0, 3]), mask=mask, node=node, weight=weight)
    found = carried_once(t)
    assert found.mask.tolist() == [
        [True, False, True], [False, True, True], [False, True, True], [True, True, True],
    ]  # fmt: skip
    assert found.weight.tolist() == [[0.75, 0, 1], [0, 1, 1], [0, 0.5, 1], [0.25, 0.5, 0]]
    assert found.decision_weight.sum() == t.decision_weight.sum()
    assert carried_once(t.replace(node=None)).mask is mask
