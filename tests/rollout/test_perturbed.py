"""Search in weight space: the ranking's direction is minus the gradient of the ordinary loss."""

import pytest
import torch
from torch import nn

from mmgrpo.core import Trajectories
from mmgrpo.core.ranking import rank_graph
from mmgrpo.core.seeding import generator, mix_seed
from mmgrpo.methods import load_method
from mmgrpo.policies.perturbed import PerturbationPayload, PerturbedPolicy
from mmgrpo.protocols import Cost, Prompt, Rollout, Sample
from mmgrpo.rollout.perturbed import PerturbedEngine

PROMPTS = [Prompt(index, "p") for index in (3, 8)]


def in_groups(*groups):
    reward = torch.tensor([value for group in groups for value in group], dtype=torch.float64)
    index = torch.cat([torch.full((len(group),), place) for place, group in enumerate(groups)])
    return reward, Trajectories(group=index, mask=torch.ones(len(index), 1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.25]]))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.b = nn.Parameter(torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16))


class Inner:
    """Stands in for a policy and its engine: a sample's length is what its weights say."""

    room = 7

    def __init__(self, network, fail=False):
        self.network, self.seen, self.fail = network, [], fail

    def generate(self, prompts, *, group_size, seed, version=0, iteration=0):
        if self.fail:
            raise RuntimeError("out of memory")
        self.seen.append((group_size, seed, version, iteration))
        value = float(self.network.a.detach().sum())
        trajectories = Trajectories(
            group=torch.tensor([prompt.index for prompt in prompts]), mask=torch.ones(2, 4)
        )
        samples = [Sample(prompt, completion=str(value)) for prompt in prompts]
        return Rollout(trajectories, samples, Cost(forwards=5, decisions=8))


@pytest.fixture
def policy():
    return PerturbedPolicy(Inner(Net()), 0.5)


def draw(policy, group_size=4, **options):
    engine = PerturbedEngine(policy.inner, policy, PerturbationPayload)
    return engine.generate(PROMPTS, group_size=group_size, seed=11, **options)


# -- the ranking --------------------------------------------------------------------------------


def test_the_direction_of_a_ranked_pair_of_four():
    """Best candidate 2, then 0: g = .44; the program's weights give .52."""
    xi = torch.tensor([0.1, -0.2, 0.3, -0.4], dtype=torch.float64)
    reward, group = in_groups([0.8, 0.1, 0.9, 0.2])
    weights = rank_graph(reward, group, top=2)
    torch.testing.assert_close(weights * 5 / 4, torch.tensor([1.0, -2, 3, -2]).double())
    assert float((weights * xi).mean()) == pytest.approx(0.44)
    code = rank_graph(reward, group, top=2, published_code=True)
    assert float((code * xi).mean()) == pytest.approx(0.52)


@pytest.mark.parametrize(("size", "top"), [(2, 1), (5, 1), (6, 3), (4, 4)])
def test_the_number_of_edges_and_the_sum_of_weights(size, top):
    reward, group = in_groups(torch.randperm(size, generator=generator(size)).double().tolist())
    weights = rank_graph(reward, group, top=top)
    k = min(top, size - 1)  # the last of a whole order has no edge from it
    edges = k * (k - 1) / 2 + k * (size - k)
    assert float(weights.sum()) == pytest.approx(0, abs=1e-12)
    assert float(weights.max()) == pytest.approx((size - 1) * size / edges)


def test_one_elite_is_best_minus_the_mean_of_the_others():
    reward, group = in_groups([0.1, 0.7, 0.3], [2.0, 1.0])
    weights = rank_graph(reward, group, top=1)
    torch.testing.assert_close(weights, torch.tensor([-1.5, 3, -1.5, 2, -2]).double())


def test_equal_rewards_say_nothing_and_missing_ones_take_no_part():
    reward, group = in_groups([1.0, 1.0, 1.0], [0.0, float("nan"), 1.0], [5.0])
    weights = rank_graph(reward, group, top=2)
    assert weights[:3].tolist() == [0, 0, 0]
    assert weights[3] == -2
    assert weights[4].isnan()
    assert weights[5] == 2
    assert weights[6] == 0
    with pytest.raises(ValueError, match="top"):
        rank_graph(reward, group, top=0)


# -- perturbed weights --------------------------------------------------------------------------


def test_each_member_has_its_own_weights_and_the_policy_keeps_its_own(policy):
    before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
    rollout = draw(policy, version=3, iteration=2)
    for name, parameter in policy.network.named_parameters():
        assert torch.equal(parameter, before[name])
    assert policy.inner.seen == [(1, 11, 3, 2)] * 4
    assert rollout.trajectories.group.tolist() == [3] * 4 + [8] * 4
    assert [sample.prompt.index for sample in rollout.samples] == [3] * 4 + [8] * 4
    values = [float(sample.completion) for sample in rollout.samples]
    assert values[:4] == values[4:]
    wanted = [
        float(
            (before["a"] + 0.5 * torch.randn(2, 2, generator=generator(mix_seed(11), i, 0))).sum()
        )
        for i in range(4)
    ]
    assert values[:4] == pytest.approx(wanted)
    assert rollout.cost == Cost(forwards=20, decisions=8)


def test_the_weights_come_back_after_an_error(policy):
    before = policy.network.a.clone()
    policy.inner.fail = True
    with pytest.raises(RuntimeError):
        draw(policy)
    assert torch.equal(policy.network.a, before)


def test_the_loss_s_gradient_is_minus_the_direction(policy):
    """Against the plain sum over edges (xi_i - xi_j) / |E|, averaged over the prompts."""
    method = load_method("zo-ranksgd", reward={"shaping": [{"name": "rank_graph", "top": 2}]})
    rollout = draw(policy)
    rewards = torch.tensor([0.8, 0.1, 0.9, 0.2, 0.3, 0.4, 0.1, 0.2])
    trajectories = method.prepare(rollout.trajectories.replace(rewards={"r": rewards}))
    halves = [trajectories.select(torch.arange(8) % 2 == part) for part in (0, 1)]
    whole = policy.evaluate(trajectories).log_prob
    torch.testing.assert_close(whole, trajectories.old_log_prob, rtol=0, atol=0)
    torch.testing.assert_close(policy.evaluate(halves[1]).log_prob, whole[1::2])
    method.loss(whole, trajectories).loss.backward()
    xi = [torch.randn(2, 2, generator=generator(mix_seed(11), i, 0)) for i in range(4)]
    edges = [[(2, 0), (2, 1), (2, 3), (0, 1), (0, 3)], [(1, 0), (1, 3), (1, 2), (0, 3), (0, 2)]]
    direction = sum(sum(xi[i] - xi[j] for i, j in group) / 5 for group in edges) / 2
    torch.testing.assert_close(policy.network.a.grad, -direction)
    assert policy.network.b.grad is not None
    assert policy.network.frozen.grad is None


def test_the_inner_policy_answers_for_everything_else(policy):
    assert policy.room == 7
    with pytest.raises(AttributeError):
        _ = policy.nothing_of_the_kind


def test_ascent_climbs():
    """Only ranks are seen, and the weights still come near the optimum of a quadratic."""
    network = Net()
    network.b.requires_grad_(False)
    policy = PerturbedPolicy(Inner(network), 0.1)
    goal = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    start = float((network.a.detach() - goal).square().sum())
    for step in range(60):
        scores = []
        for member in range(8):
            with policy.perturbed(step, member):
                scores.append(-(network.a.detach() - goal).square().sum())
        names = torch.tensor([[step, member] for member in range(8)])
        batch = Trajectories(
            group=torch.zeros(8, dtype=torch.int64),
            mask=torch.ones(8, 1),
            payload=PerturbationPayload(names),
        )
        weights = rank_graph(torch.stack(scores), batch, top=3)
        loss = -(weights[:, None] * policy.evaluate(batch).log_prob).mean()
        (gradient,) = torch.autograd.grad(loss, network.a)
        network.a.data -= 0.05 * gradient
    assert float((network.a.detach() - goal).square().sum()) < 0.05 * start
