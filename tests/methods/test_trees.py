"""Credit on trees: a node's reward, its depth's statistics, what pruning leaves out."""

from __future__ import annotations

import statistics

import pytest
import torch

from mmgrpo.core import Trajectories, denominators
from mmgrpo.core.credit import depthwise
from mmgrpo.core.diffusion import Tree
from mmgrpo.core.filters import prune_leaves
from mmgrpo.errors import MethodError
from mmgrpo.methods import load_method


def tree_of(rewards, splits, steps, *, groups=1, width=2, seed=0):
    """A batch whose rows are the leaves of one tree per group; the last step is not trained."""
    stochastic = torch.arange(steps) < steps - 1
    size = len(rewards) // groups
    owner = Tree(splits=tuple(splits), width=width).owners(size, stochastic)
    node = (owner[:, 1:] * steps + torch.arange(steps)).repeat(groups, 1)
    draw = torch.rand(size * groups, steps, generator=torch.Generator().manual_seed(seed)).double()
    return Trajectories(
        group=torch.arange(groups).repeat_interleave(size),
        mask=stochastic.repeat(len(rewards), 1),
        node=node,
        rewards={"score": torch.tensor(rewards, dtype=torch.float64)},
        old_log_prob=draw,
        step_std=torch.ones(len(rewards), steps),
        step_length=torch.ones(len(rewards), steps),
    )


def brute_force(t):
    """Advantages over nodes, by dictionaries."""
    reward, found = t.rewards["score"].tolist(), torch.zeros(t.mask.shape, dtype=torch.float64)
    for group in set(t.group.tolist()):
        rows = [i for i, g in enumerate(t.group.tolist()) if g == group]
        for step in range(t.mask.shape[1]):
            nodes: dict[int, list[float]] = {}
            for i in rows:
                if t.mask[i, step]:
                    nodes.setdefault(int(t.node[i, step]), []).append(reward[i])
            fused = {node: statistics.fmean(leaves) for node, leaves in nodes.items()}
            std = statistics.stdev(fused.values()) if len(fused) > 1 else 0.0
            mean = statistics.fmean(fused.values()) if fused else 0.0
            for i in rows:
                if t.mask[i, step] and std >= 1e-6:
                    found[i, step] = (fused[int(t.node[i, step])] - mean) / (std + 1e-8)
    return found


def test_the_worked_tree():
    t = tree_of([0.30, 0.34, 0.26, 0.38], splits=(0, 1), steps=3)
    found = load_method("branch-grpo").prepare(t).advantage
    assert found[:, 0].tolist() == [0.0] * 4  # both branches average .32
    assert found[:, 1].tolist() == pytest.approx([-0.3873, 0.3873, -1.1619, 1.1619], abs=1e-4)
    assert found[:, 2].tolist() == [0.0] * 4


@pytest.mark.parametrize("splits", [(0, 2, 3), (1, 2, 4), ()])
def test_depths_against_brute_force(splits):
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(3)).tolist()
    t = tree_of(rewards, splits, steps=7, groups=2)
    found = load_method("branch-grpo").prepare(t)
    torch.testing.assert_close(found.advantage, brute_force(t), rtol=1e-9, atol=1e-12)


def test_the_trunk_before_the_first_split_trains_nothing():
    t = tree_of([1.0, 0.0, 0.5, 0.2], splits=(2, 3), steps=6)
    found = load_method("branch-grpo").prepare(t).advantage
    assert (found[:, :2] == 0).all()
    assert (found[:, 2:5] != 0).all()
    assert sorted(found[:, 2].abs().tolist()) == pytest.approx([0.5**0.5] * 4)


def test_without_splits_it_is_the_groups_z_score():
    t = tree_of([1.0, 0.0, 0.5, 0.2], splits=(), steps=4)
    for candidate in (t, t.replace(node=None)):
        found = depthwise(t.rewards["score"], candidate)
        dance = load_method("dance-grpo").prepare(t.replace(node=None)).advantage
        torch.testing.assert_close(found, dance, rtol=1e-7, atol=1e-9)


def test_an_outlier_is_clamped():
    t = tree_of([100.0] + [0.0] * 63, splits=(0,), steps=3, width=64)
    assert depthwise(t.rewards["score"], t)[0, 0].item() == 5.0
    assert depthwise(t.rewards["score"], t, clip=7.0)[0, 0].item() == 7.0


def edges(t):
    return denominators(t).decisions


def test_the_published_counts_of_edges():
    """20 steps, splits 0, 3, 6, 9: 218 edges less the 16 last ones; 80 - 8 are pruned."""
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(1)).tolist()
    t = tree_of(rewards, splits=(0, 3, 6, 9), steps=20)
    whole = load_method("branch-grpo").prepare(t)
    assert edges(whole) == pytest.approx(218 - 16)
    pruned = load_method("branch-grpo-pruned").prepare(t)
    assert edges(pruned) == pytest.approx(218 - 16 - 72)
    assert torch.equal(pruned.mask[:, :10], t.mask[:, :10])
    order = sorted(range(16), key=lambda i: rewards[i])
    kept = sorted(order[:4] + order[-4:])
    assert pruned.mask[:, 10].nonzero().flatten().tolist() == kept
    assert torch.equal(pruned.advantage[pruned.mask], whole.advantage[pruned.mask])
    assert torch.equal(pruned.weight[:, :10], whole.weight[:, :10])


def test_ties_go_to_the_earlier_leaf_and_linear_rollouts_are_not_pruned():
    t = tree_of([0.5] * 8, splits=(0, 1, 2), steps=6)
    t = t.replace(advantage=torch.zeros(8, 6))
    keep = prune_leaves(t, t.rewards["score"], keep=0.5)
    assert keep[:, 3].tolist() == [True, True, False, False, False, False, True, True]
    assert keep[:, :3].all()
    assert prune_leaves(t.replace(node=None), t.rewards["score"]).all()
    with pytest.raises(ValueError, match="keep must be in"):
        prune_leaves(t, t.rewards["score"], keep=0.0)


def test_groups_are_pruned_apart():
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(5)).tolist()
    both = tree_of(rewards, splits=(0, 1, 2), steps=6, groups=2)
    method = load_method("branch-grpo-pruned")
    whole = method.prepare(both)
    for group in (0, 1):
        rows = torch.arange(8) + 8 * group
        alone = method.prepare(both.select(rows))
        assert torch.equal(alone.mask, whole.mask[rows])
        assert torch.equal(alone.advantage, whole.advantage[rows])


def test_splits_as_shares_of_the_schedule():
    tree = load_method("branch-grpo").rollout.tree
    assert tree.split_steps(torch.arange(20) < 19) == [0, 3, 6, 9]
    assert tree.split_steps(torch.arange(10) < 9) == [0, 1, 3, 4]
    owner = tree.owners(16, torch.arange(10) < 9)
    assert [len(owner[:, level].unique()) for level in range(11)] == [
        1, 2, 4, 4, 8, 16, 16, 16, 16, 16, 16,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "num_steps", "group_size", "message"),
    [
        ("branch-grpo", 20, 24, "a group of 24 is no multiple of the tree's 16 leaves"),
        ("tempflow-grpo", 10, 6, "a group of 6 is no multiple of 4 roots"),
        ("mix-grpo", 2, 8, "last 0"),
        ("flow-grpo", 1, 8, "at least 2 steps"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(name, num_steps, group_size, message):
    with pytest.raises(MethodError, match=message):
        load_method(name).check_rollout(num_steps=num_steps, group_size=group_size)
    load_method(name).check_rollout(num_steps=10, group_size=16)


def test_a_split_that_draws_no_noise_is_refused():
    method = load_method("branch-grpo", rollout={"tree": {"splits": [0, 12]}})
    with pytest.raises(MethodError, match=r"split steps \[12\] draw no noise"):
        method.check_rollout(num_steps=10, group_size=16)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"width": 0}, "width and roots must be at least 1"),
        ({"splits": [-1]}, "must not be negative"),
        ({"splits": "all"}, "splits"),
        ({"depth": 3}, "unknown option 'depth'"),
    ],
)
def test_a_wrong_tree_is_one_sentence(tree, message):
    with pytest.raises(MethodError, match=message):
        load_method("branch-grpo", rollout={"tree": tree})
