"""Trees in the flow engine: what is shared is computed once, one child is a linear rollout."""

from __future__ import annotations

import pytest
import torch
from flow_drawing import (
    CLOSE,
    PROMPTS,
    STEPS,
    assert_same,
    count_states,
    draw,
    draw_method,
    moved_evaluation,
)

from mmgrpo.core.diffusion import Tree
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.methods import load_method


@pytest.mark.parametrize(
    "tree",
    [
        Tree(splits=(0, 2), width=1),
        Tree(splits="stochastic", width=1),
        Tree(splits=(2,), width=None, roots=4),
    ],
    ids=["one child", "one child everywhere", "anchor and one branch"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_tree_with_one_child_is_a_linear_rollout(policy, tree, shared):
    wanted = draw(policy, shared_noise=shared).trajectories
    found = draw(policy, tree=tree, shared_noise=shared).trajectories
    assert_same(found, wanted)
    assert found.node is None


def test_a_tree_computes_shared_states_once(policy, monkeypatch):
    """20 steps, splits at 0, 3, 6, 9: 203 forwards and 16 leaves, as published."""
    seen = count_states(policy, monkeypatch)
    rollout = draw(
        policy, num_steps=20, kernel="dance_sde", eta=0.3, group_size=16, prompts=PROMPTS[:1],
        tree=Tree(splits=(0, 3, 6, 9)),
    )  # fmt: skip
    assert seen == [1] + [2] * 3 + [4] * 3 + [8] * 3 + [16] * 10
    assert sum(seen) == 203
    assert rollout.cost.decisions == 218 - 16
    found = rollout.trajectories
    assert len(found.node[found.mask].unique()) == 218 - 16  # the last edges draw no noise here
    seen.clear()
    log_prob = policy.evaluate(found).log_prob
    assert seen == [203 - 16]
    torch.testing.assert_close(log_prob, found.old_log_prob, rtol=0, atol=2e-6)
    x = found.payload.latents
    for split, leaves in [(0, 8), (3, 4), (6, 2), (9, 1)]:
        for leaf in range(16):
            first = leaf // leaves * leaves
            assert torch.equal(x[leaf, split + 1], x[first, split + 1])
        assert not torch.equal(x[0, split + 1], x[leaves, split + 1])
        assert torch.equal(x[0, split], x[leaves, split])


def test_several_trees_make_a_group_and_batches_do_not_matter(policy):
    tree = Tree(splits=(1, 3))
    both = draw(policy, tree=tree, group_size=8).trajectories
    alone = draw(policy, tree=tree, group_size=8, prompts=PROMPTS[1:]).trajectories
    torch.testing.assert_close(both.payload.latents[8:], alone.payload.latents, **CLOSE)
    assert torch.equal(both.node[8:], alone.node)
    x = both.payload.latents[:8]
    assert torch.equal(x[0, 0], x[3, 0])
    assert not torch.equal(x[0, 0], x[4, 0])
    joined = Trajectories.cat([both, alone])
    with torch.no_grad():
        found = policy.evaluate(joined.select(torch.arange(23, -1, -1))).log_prob
    torch.testing.assert_close(found, joined.old_log_prob.flip(0), rtol=0, atol=2e-6)


def test_a_tree_costs_the_gradient_of_its_nodes_once(policy):
    """The loss over the rows equals the loss over the distinct decisions."""
    found = draw(policy, tree=Tree(splits=(0, 2)), prompts=PROMPTS[:1]).trajectories
    method = load_method("loop", aggregate="token_mean")
    rewards = {"score": torch.tensor([1.0, 0.0, 0.5, 0.25])}
    prepared = method.prepare(found.replace(rewards=rewards))
    policy.network.zero_grad()
    method.loss(policy.evaluate(prepared).log_prob, prepared).loss.backward()
    gradient = policy.network.proj_out.bias.grad.clone()
    policy.network.zero_grad()
    log_prob, wanted, seen = policy.evaluate(prepared).log_prob, 0.0, {}
    for row, step in prepared.mask.nonzero().tolist():
        seen.setdefault(int(prepared.node[row, step]), []).append((row, step))
    for places in seen.values():
        advantage = sum(prepared.advantage[place] for place in places) / len(places)
        wanted = wanted - advantage * log_prob[places[0]] / len(seen)
    wanted.backward()
    torch.testing.assert_close(gradient, policy.network.proj_out.bias.grad, rtol=1e-4, atol=1e-8)
    policy.network.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": Tree(splits=(0, 1, 2))}, "a group of 4 is no multiple of the tree's 8 leaves"),
        ({"tree": Tree(splits=(5,))}, r"split steps \[5\] draw no noise"),
        ({"tree": Tree(splits=(1,), width=None, roots=3)}, "no multiple of 3 roots"),
        ({"tree": Tree(splits=(1, 2), width=None)}, "needs a width"),
    ],
)
def test_a_tree_that_does_not_fit_is_named(policy, options, message):
    with pytest.raises(ConfigError, match=message):
        draw(policy, **options)


def edge_counts(policy, name, monkeypatch):
    """States per network call in rollout and update, and the number of trained edges."""
    seen = count_states(policy, monkeypatch)
    rollout = draw_method(policy, name, num_steps=20, group_size=16, prompts=PROMPTS[:1])
    drawn = list(seen)
    rewards = {"score": torch.rand(16, generator=torch.Generator().manual_seed(2))}
    prepared = load_method(name).prepare(rollout.trajectories.replace(rewards=rewards))
    seen.clear()
    found = policy.evaluate(prepared)
    mask = prepared.mask
    torch.testing.assert_close(found.log_prob[mask], prepared.old_log_prob[mask], rtol=0, atol=2e-6)
    return sum(drawn), sum(seen), round(float(prepared.weight.sum()))


def test_the_branch_presets_compute_what_their_formulas_say(policy, monkeypatch):
    """Every leaf is drawn; the update pays for the parents of the edges it keeps."""
    assert edge_counts(policy, "branch-grpo", monkeypatch) == (203, 187, 202)
    assert edge_counts(policy, "branch-grpo-pruned", monkeypatch) == (203, 187 - 72, 202 - 72)
    assert edge_counts(policy, "branch-grpo-mix", monkeypatch) == (203, 1 + 2 + 4 + 8, 30)


@pytest.mark.parametrize("seed", [1, 2])
def test_tempflow_branches_from_four_trunks_at_one_step(policy, monkeypatch, seed):
    seen = count_states(policy, monkeypatch)
    found = draw_method(policy, "tempflow-grpo", group_size=12, seed=seed, prompts=PROMPTS[:1])
    (step,) = found.trajectories.mask[0].nonzero().flatten().tolist()
    assert seen == [4] * (step + 1) + [12] * (STEPS - step - 1)
    x = found.trajectories.payload.latents
    for trunk in x[:, : step + 1].split(3):
        assert torch.equal(trunk, trunk[:1].expand_as(trunk))
    assert torch.pdist(x[:, step + 1].flatten(1)).min() > 0.1
    seen.clear()
    policy.evaluate(found.trajectories)
    assert seen == [4]
    assert found.trajectories.node is None


def test_siblings_share_velocity_and_divergence(policy):
    """With one state before the step their ratios differ by their noise only."""
    method = load_method("tempflow-grpo", regulariser=None, ratio="guard")
    rollout = draw_method(policy, "tempflow-grpo", group_size=12, prompts=PROMPTS[:1])
    trajectories, found, now = moved_evaluation(policy, rollout.trajectories, method)
    (step,) = trajectories.mask[0].nonzero().flatten().tolist()
    for trunk, divergence in zip(
        now[:, step].split(3), found.divergence[:, step].split(3), strict=True
    ):
        assert torch.equal(trunk, trunk[:1].expand_as(trunk))
        assert (divergence == divergence[0]).all()
        assert divergence[0] > 0
    log_ratio = (found.log_prob - trajectories.old_log_prob)[:, step]
    assert len(log_ratio.unique()) == 12
