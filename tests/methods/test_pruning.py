"""What BranchGRPO's prunings leave, path weights, and Dynamic-TreeRPO's growing noise."""

from __future__ import annotations

import math

import pytest
import torch
from test_trees import edges, tree_of

from mmgrpo.core.credit import depthwise, node_mean, path_mean, uniform
from mmgrpo.core.diffusion import StepRule, Tree, select_steps
from mmgrpo.core.filters import prune_steps
from mmgrpo.methods import load_method

SPLITS = (0, 3, 6, 9)
PUBLISHED = [1] * 1 + [2] * 3 + [4] * 3 + [8] * 3 + [16] * 10
"""States that each of 20 steps starts from."""


def published_tree(seed=1):
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(seed)).tolist()
    return tree_of(rewards, splits=SPLITS, steps=20)


def test_the_published_counts():
    owner = Tree(splits=SPLITS).owners(16, torch.ones(20, dtype=torch.bool))
    levels = [len(level.unique()) for level in owner.T]
    assert levels[:-1] == PUBLISHED
    assert levels[1:] == [*PUBLISHED[1:], 16]
    assert (sum(levels[:-1]), sum(levels[1:]), sum(levels), levels[-1]) == (203, 218, 219, 16)
    assert sum(levels[:-1]) / 16 == 12.6875
    assert sum(levels) / 16 == 13.6875
    assert (sum(levels[1:]) - 80) / 16 == 8.625


# -- width, inside each branch --------------------------------------------------------------------


def test_of_every_branch_the_earlier_half_stays():
    """Of the 10 published edges after the last split, 5; the 10th is not trained anyway."""
    t = published_tree()
    whole = load_method("branch-grpo").prepare(t)
    pruned = load_method("branch-grpo", filter=[{"name": "prune_steps"}]).prepare(t)
    assert pruned.mask[0].nonzero().flatten().tolist() == list(range(15))
    assert (pruned.mask == pruned.mask[0]).all()
    assert edges(pruned) == 218 - 80
    assert torch.equal(pruned.advantage[:, :15], whole.advantage[:, :15])
    assert (pruned.advantage[:, 15:] == 0).all()


def test_higher_advantages_stay_before_earlier_ones():
    t = tree_of([1.0, 0.0, 0.5, 0.2], splits=(0, 1), steps=6)
    advantage = torch.tensor([0.0, 0.0, 1.0, 3.0, 2.0, 0.0]).repeat(4, 1)
    keep = prune_steps(t.replace(advantage=advantage), t.rewards["score"], keep=0.6)
    assert keep[0].tolist() == [True, True, False, True, True, True]  # the last is not trained
    assert prune_steps(t.replace(node=None, advantage=advantage), t.rewards["score"]).all()
    with pytest.raises(ValueError, match="keep must be in"):
        prune_steps(t, t.rewards["score"], keep=1.5)


# -- depth ----------------------------------------------------------------------------------------


def trained_depths(iteration=0, count=20, **options):
    chosen = select_steps(
        {"kind": "pruned_depths", **options}, count,
        seed=0, sample_seeds=[1, 2], iteration=iteration,
    )  # fmt: skip
    assert chosen.stochastic.nonzero().flatten().tolist() == list(range(count - 1))
    assert torch.equal(chosen.trained[0], chosen.trained[1])
    return [step + 1 for step in chosen.trained[0].nonzero().flatten().tolist()]


def test_depths_are_left_out_of_the_update_only():
    assert trained_depths(depths=[15, 16, 17, 18, 19]) == list(range(1, 15))
    assert trained_depths(depths=[0.5, 1.0]) == [*range(1, 10), *range(11, 20)]
    mask = torch.zeros(16, 20, dtype=torch.bool)
    mask[:, [depth - 1 for depth in trained_depths(depths=[12, 13, 14, 15, 16])]] = True
    t = published_tree()
    method = load_method("branch-grpo")
    whole, pruned = method.prepare(t), method.prepare(t.replace(mask=mask))
    assert edges(pruned) == 218 - 16 - 80
    assert torch.equal(pruned.advantage, whole.advantage * mask)


def test_sliding_depths_move_towards_the_last_split_and_stay_there():
    sliding = {"depths": [16, 17, 18, 19, 20], "interval": 30, "stop": 9}

    def left_out(iteration):
        return sorted(set(range(1, 21)) - set(trained_depths(iteration, **sliding)))

    assert left_out(29) == [16, 17, 18, 19, 20]
    assert left_out(30) == [15, 16, 17, 18, 19, 20]  # the last is never trained
    assert left_out(65) == [14, 15, 16, 17, 18, 20]
    assert left_out(209) == [10, 11, 12, 13, 14, 20]
    assert left_out(210) == left_out(5000) == [9, 10, 11, 12, 13, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": []}, r"depths must lie in \[1, 20\]"),
        ({"depths": [0]}, "depths must lie"),
        ({"depths": [21]}, "depths must lie"),
        ({"depths": [3], "interval": 0}, "interval must be at least 1"),
        ({"depths": list(range(1, 20))}, "no step to train"),
    ],
)
def test_wrong_depths_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        trained_depths(**options)


# -- path weights ---------------------------------------------------------------------------------


def worked_tree():
    t = tree_of([0.30, 0.34, 0.26, 0.38], splits=(0, 1), steps=3)
    old = t.old_log_prob.clone()
    old[:, 1] = torch.tensor([-1.10, -1.30, -0.90, -1.00])
    return t.replace(old_log_prob=old)


def test_the_worked_fusion():
    t = worked_tree()
    fused = path_mean(t.rewards["score"], t, temperature=1.0)
    assert fused[:, 0].tolist() == pytest.approx([0.318007] * 2 + [0.317002] * 2, abs=1e-6)
    found = load_method("branch-grpo", credit={"temperature": 1.0}).prepare(t).advantage
    assert found[:, 0].tolist() == pytest.approx([0.7071] * 2 + [-0.7071] * 2, abs=1e-4)
    assert found[:, 1].tolist() == pytest.approx([-0.3873, 0.3873, -1.1619, 1.1619], abs=1e-4)


def recursive_fusion(t, temperature):
    """Over dictionaries of nodes, from the root."""
    reward, steps = t.rewards["score"].tolist(), t.mask.shape[1]
    found = torch.zeros(t.mask.shape, dtype=torch.float64)

    def value(rows, step):
        later = [s for s in range(step + 1, steps) if t.mask[rows[0], s]]
        if not later:
            return sum(reward[i] for i in rows) / len(rows)
        children = {}
        for i in rows:
            children.setdefault(int(t.node[i, later[0]]), []).append(i)
        weights = {c: math.exp(float(t.old_log_prob[r[0], later[0]]) / temperature)
                   for c, r in children.items()}  # fmt: skip
        total = sum(weights.values())
        return sum(weights[c] / total * value(r, later[0]) for c, r in children.items())

    for group in t.group.unique():
        members = (t.group == group).nonzero().flatten().tolist()
        for step in range(steps):
            for i in members:
                if t.mask[i, step]:
                    same = [j for j in members
                            if t.mask[j, step] and t.node[j, step] == t.node[i, step]]  # fmt: skip
                    found[i, step] = value(same, step)
    return found


@pytest.mark.parametrize(("splits", "width"), [((0, 2, 3), 2), ((1, 4), 3), ((), 2)])
@pytest.mark.parametrize("sparse", [False, True])
def test_fusion_against_recursion(splits, width, sparse):
    count = 2 * (width ** len(splits))
    rewards = torch.rand(count, generator=torch.Generator().manual_seed(4)).tolist()
    t = tree_of(rewards, splits, steps=6, groups=2, width=width)
    decisions = torch.rand(2, int(t.node.max()) + 1, generator=torch.Generator().manual_seed(5))
    t = t.replace(old_log_prob=-decisions.double()[t.group[:, None], t.node])
    if sparse:  # noise at the splits only, and a leaf that nothing scores
        mask = torch.zeros_like(t.mask)
        mask[1:, [*splits, 4]] = True
        t = t.replace(mask=mask)
    for temperature in (0.3, 1.0):
        found = path_mean(t.rewards["score"], t, temperature=temperature)
        wanted = recursive_fusion(t, temperature)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    if not sparse:  # with equally many leaves below all children
        hot = path_mean(t.rewards["score"], t, temperature=1e9)
        even = node_mean(uniform(t.rewards["score"], t), t)
        torch.testing.assert_close(hot, even, rtol=1e-7, atol=1e-9)


def test_fusion_without_numbers_is_refused():
    t = worked_tree()
    with pytest.raises(ValueError, match="temperature must be positive"):
        path_mean(t.rewards["score"], t, temperature=0.0)
    with pytest.raises(ValueError, match=r"need trajectories\.node"):
        path_mean(t.rewards["score"], t.replace(old_log_prob=None), temperature=1.0)
    linear = t.replace(node=None)
    assert torch.equal(
        depthwise(t.rewards["score"], linear, temperature=1.0),
        depthwise(t.rewards["score"], linear),
    )


# -- growing noise --------------------------------------------------------------------------------


def test_the_worked_growth():
    rule = StepRule("flow_sde", 0.7, 0.9)
    window = (torch.arange(10) >= 3) & (torch.arange(10) < 7)
    grown = rule.growing(0.5, window)
    assert grown.levels[3:7] == pytest.approx([0.7, 0.7875, 0.875, 0.9625])
    assert set(grown.levels[:3] + grown.levels[7:]) == {0.7}
    five = rule.growing(0.5 * 5 / 4, torch.arange(10) < 5)  # to the end of the published list
    assert five.levels[:5] == pytest.approx([0.7, 0.7875, 0.875, 0.9625, 1.05])
    assert rule.growing(0.0, window) is rule
    assert grown.at(torch.tensor([6, 3])).eta.tolist() == pytest.approx([0.9625, 0.7])
    assert rule.at(4) is rule


def test_the_window_of_dynamic_treerpo_has_thirty_edges():
    rollout = load_method("dynamic-treerpo").rollout
    chosen = select_steps(rollout.selection, 20, seed=0, sample_seeds=[0])
    owner = rollout.tree.owners(16, chosen.stochastic, shared_start=True)
    levels = [len(level.unique()) for level in owner.T]
    assert levels[:6] == [1, 2, 4, 8, 16, 16]
    assert sum(levels[1:5]) == 30


def test_an_edge_carries_the_mean_of_its_leaves():
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(2)).double()
    t = tree_of(rewards.tolist(), splits=(0, 1, 2, 3), steps=5)
    found = load_method("dynamic-treerpo").prepare(t).advantage
    z = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    for step, leaves in enumerate((8, 4, 2, 1)):
        wanted = z.reshape(-1, leaves).mean(dim=1).repeat_interleave(leaves)
        torch.testing.assert_close(found[:, step], wanted)


def test_the_supervised_target_is_the_best_leafs_prediction():
    t = tree_of([0.1, 0.9, 0.9, 0.3, 5.0, 2.0, 7.0, math.nan], splits=(0, 1), steps=3, groups=2)
    old = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mask = t.mask.clone()
    mask[6, 1] = False  # the best sample of the second group has no decision there
    found = load_method("dynamic-treerpo").prepare(t.replace(old_prediction=old, mask=mask))
    best = found.best_prediction
    assert torch.equal(best[:4, :2], old[[1] * 4, :2])
    assert torch.equal(best[4:, 0], old[[6] * 4, 0])
    assert torch.equal(best[4:, 1], old[4:, 1])
    assert load_method("dynamic-treerpo").needs == {"groups", "old_prediction"}
