"""Windows, suffixes and trees in the flow engine: what is shared is computed once, limits agree."""

from __future__ import annotations

import pytest
import torch
from fixtures_flow import SIZE, sd3_pipeline

from mmgrpo.core.diffusion import Suffix, Tree, dpmpp_2m, linear_shift, transition
from mmgrpo.core.seeding import generator
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.methods import load_method
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.flow import FlowEngine

pytest.importorskip("diffusers")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 network calls of different batch sizes
PROMPTS = [Prompt(4, "draw 42"), Prompt(9, "red circle")]
STEPS = 6


@pytest.fixture(scope="module")
def policy():
    return FlowPolicy(sd3_pipeline(), max_prompt_tokens=3)


def draw(policy, *, prompts=PROMPTS, group_size=4, seed=1, iteration=0, **options):
    engine = FlowEngine(
        policy, **{"num_steps": STEPS, "height": SIZE, "width": SIZE, "decode": False, **options}
    )
    return engine.generate(prompts, group_size=group_size, seed=seed, iteration=iteration)


def draw_method(policy, name, *, overrides=None, **options):
    """Draw with the rollout that a preset fixes."""
    fixed = load_method(name, **{"rollout": overrides or {}}).rollout
    return draw(
        policy, kernel=fixed.kernel, eta=fixed.eta, selection=fixed.selection,
        shared_noise=fixed.shared_noise, tree=fixed.tree, suffix=fixed.suffix, **options,
    )  # fmt: skip


def assert_same(one, other):
    """Bit for bit the same states, decisions and log-probabilities."""
    assert torch.equal(one.payload.latents, other.payload.latents)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.old_log_prob, other.old_log_prob)


def count_states(policy, monkeypatch):
    """The number of states in every network call from now on."""
    seen: list[int] = []
    plain = type(policy).velocity

    def counted(latents, *rest):
        seen.append(len(latents))
        return plain(policy, latents, *rest)

    monkeypatch.setattr(policy, "velocity", counted)
    return seen


# -- windows --------------------------------------------------------------------------------------


def test_a_window_over_all_steps_is_flow_grpo(policy):
    wanted = draw_method(policy, "flow-grpo").trajectories
    whole = {"kind": "moving_window", "width": STEPS - 1, "last": STEPS - 1}
    for name, changes in [
        ("mix-grpo", {"selection": whole, "shared_noise": False}),
        ("flow-grpo-fast", {"selection": {"kind": "window", "width": STEPS - 1}}),
        ("mix-grpo-flash", {"selection": whole, "shared_noise": False}),
    ]:
        found = draw_method(policy, name, overrides=changes, iteration=3).trajectories
        if name != "mix-grpo-flash":
            assert_same(found, wanted)
        else:  # one ODE step is left, from known x0: DPM-Solver++ has the order 1 there too
            torch.testing.assert_close(found.payload.latents, wanted.payload.latents, **CLOSE)
            assert torch.equal(found.old_log_prob, wanted.old_log_prob)


def test_the_window_moves_with_the_iteration_and_is_shared_by_the_ranks(policy):
    starts = []
    for iteration in range(8):
        ranks = [
            draw_method(
                policy, "mix-grpo", overrides={"selection": {"width": 2, "interval": 2}},
                iteration=iteration, prompts=[prompt],
            ).trajectories
            for prompt in PROMPTS
        ]  # fmt: skip
        masks = torch.cat([rank.mask for rank in ranks])
        assert (masks == masks[0]).all()
        starts.append(masks[0].nonzero().flatten().tolist())
    assert starts == [places for places in ([0, 1], [1, 2], [2, 3], [3]) for _ in range(2)]


def test_the_random_window_is_shared_by_the_ranks_and_changes_with_the_seed(policy):
    def masks(prompt, seed):
        found = draw_method(policy, "flow-grpo-fast", prompts=[prompt], seed=seed, group_size=2)
        return found.trajectories.mask

    for seed in range(4):
        assert torch.equal(masks(PROMPTS[0], seed), masks(PROMPTS[1], seed))
    places = {tuple(masks(PROMPTS[0], seed)[0].tolist()) for seed in range(8)}
    assert len(places) > 1
    assert all(sum(place) == 2 and not place[-1] for place in places)


@pytest.mark.parametrize("shared", [False, True])
def test_the_steps_before_a_window_are_computed_once_per_start(policy, monkeypatch, shared):
    selection = {"kind": "window", "start": 2, "width": 2}
    plain = draw(policy, selection=selection).trajectories
    seen = count_states(policy, monkeypatch)
    rollout = draw(policy, selection=selection, shared_noise=shared)
    alike = 2 if shared else 8  # two prompts
    assert seen == [alike] * 3 + [8] * 3
    assert rollout.cost.forwards == STEPS
    found = rollout.trajectories
    assert found.node is None
    if not shared:
        assert_same(found, plain)
    seen.clear()
    log_prob = policy.evaluate(found).log_prob
    assert seen == [alike + 8]
    torch.testing.assert_close(log_prob, found.old_log_prob, rtol=0, atol=1e-6)
    seen.clear()
    policy.evaluate(found.select(torch.tensor([5, 0, 1])))
    assert seen == [(2 if shared else 3) + 3]


# -- suffix ---------------------------------------------------------------------------------------


def test_flash_is_dpm_solver_after_the_window(policy):
    """Against a plain loop for one sample."""
    count, fraction = 10, 0.5
    schedule = linear_shift(count, shift=3.0)
    rollout = draw(
        policy, num_steps=count, shift=3.0, group_size=2,
        selection={"kind": "window", "start": 1, "width": 2},
        suffix=Suffix("dpmpp_2m", fraction),
    )  # fmt: skip
    found = rollout.trajectories
    points = 3 * (u := torch.linspace(1 - 3 / count, 0, int(fraction * 8))) / (1 + 2 * u)
    assert rollout.cost.forwards == 3 + len(points) - 1
    encoded = policy.encode(PROMPTS)
    for row, name in enumerate([(1, p.index, g) for p in PROMPTS for g in range(2)]):
        x, before = torch.randn(4, SIZE // 2, SIZE // 2, generator=generator(*name))[None], None
        sigmas = torch.cat([schedule[:3], points])
        for index, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            with torch.no_grad():
                v = policy.velocity(x, sigma[None], encoded, torch.tensor([row // 2]))
            x0 = x - sigma * v
            if index in (1, 2):
                noise = torch.randn(x.shape[1:], generator=generator(*name, index))
                mean, std = transition(
                    "flow_sde", v, x, sigma, after, eta=0.7, sigma_max=schedule[1]
                )
                x = mean + std * noise
            elif index == 0:
                x = x + v * (after - sigma)
            else:
                x = dpmpp_2m(x0, x, sigma, after, previous=before)
            before = (x0, sigma)
        torch.testing.assert_close(found.payload.latents[row, -1], x[0], **CLOSE)
    with torch.no_grad():
        again = policy.evaluate(found).log_prob
    torch.testing.assert_close(again, found.old_log_prob, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("start", "calls"), [(0, 11), (5, 14), (10, 17)])
def test_flash_makes_the_published_number_of_calls(policy, start, calls):
    rollout = draw_method(
        policy, "mix-grpo-flash", num_steps=25, iteration=start * 20, group_size=2,
        prompts=PROMPTS[:1],
    )  # fmt: skip
    assert rollout.trajectories.mask[0].nonzero().flatten().tolist() == list(range(start, start + 4))
    assert rollout.cost.forwards == calls


def test_flash_star_makes_seven_calls(policy):
    star = {"selection": {"interval": 1000000}, "suffix": {"fraction": 0.2}}
    rollout = draw_method(
        policy, "mix-grpo-flash", overrides=star, num_steps=25, iteration=299, group_size=2
    )
    assert rollout.cost.forwards == 7


def test_euler_on_all_points_is_the_ode(policy):
    selection = {"kind": "window", "start": 1, "width": 2}
    wanted = draw(policy, selection=selection).trajectories
    found = draw(policy, selection=selection, suffix=Suffix("euler", 0.999999)).trajectories
    assert not Suffix("euler", 0.999999).plain
    assert found.payload.latents.shape == wanted.payload.latents.shape
    whole = Suffix("euler", 1.0).sigmas(linear_shift(STEPS), 3)
    assert torch.equal(whole, linear_shift(STEPS)[3:])


# -- guard and mask -------------------------------------------------------------------------------


def moved_evaluation(policy, trajectories, method):
    """The method's view of decisions after the network has changed, and the change undone."""
    with torch.no_grad():
        old = policy.evaluate(trajectories, Request(prediction=True)).prediction
        trajectories = trajectories.replace(old_prediction=old)
        policy.network.proj_out.bias.add_(0.02)
        found = policy.evaluate(trajectories, method.request)
        now = policy.evaluate(trajectories, Request(prediction=True)).prediction
        policy.network.proj_out.bias.sub_(0.02)
    return trajectories, found, now


def test_the_guarded_ratio_is_the_noise_times_the_shift_of_the_mean(policy):
    """log r~ = mean z (mu - mu_old), from the engine's own noise streams."""
    method = load_method("grpo-guard")
    rollout = draw_method(policy, "grpo-guard", group_size=2)
    trajectories, found, now = moved_evaluation(policy, rollout.trajectories, method)
    guarded = method.ratio(
        found.log_prob - trajectories.old_log_prob,
        trajectories.mask,
        divergence=found.divergence,
        step_std=trajectories.step_std,
    )
    payload, sigmas = trajectories.payload, trajectories.payload.sigmas
    names = [(1, prompt.index, member) for prompt in PROMPTS for member in range(2)]
    for row, step in trajectories.mask.nonzero().tolist():
        (mean, std), (before, _) = (
            transition(
                "flow_sde", v[row, step][None], payload.latents[row, step][None], sigmas[step],
                sigmas[step + 1], eta=0.7, sigma_max=sigmas[1],
            )
            for v in (now, trajectories.old_prediction)
        )  # fmt: skip
        noise = torch.randn(mean.shape[1:], generator=generator(*names[row], step))
        wanted = (noise * (mean - before)[0]).mean()
        assert trajectories.step_std[row, step].item() == pytest.approx(std.item(), rel=1e-6)
        assert guarded[row, step].item() == pytest.approx(wanted.item(), abs=2e-6)
    assert guarded.abs().max() > 1e-5


@pytest.mark.parametrize("name", ["grpo-guard", "flow-dppo"])
def test_the_methods_train_on_what_the_policy_answers(policy, name):
    method = load_method(name)
    rollout = draw_method(policy, name)
    rewards = {"score": torch.linspace(0, 1, 8)}
    prepared = method.prepare(rollout.trajectories.replace(rewards=rewards))
    trajectories, found, _ = moved_evaluation(policy, prepared, method)
    on_policy = policy.evaluate(trajectories, method.request)
    start = method.loss(on_policy.log_prob, trajectories, evaluation=on_policy)
    assert start.max_log_ratio < 1e-5
    assert start.metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    start.loss.backward()
    assert policy.network.proj_out.bias.grad.norm() > 0
    policy.network.zero_grad()
    after = method.loss(found.log_prob, trajectories, evaluation=found)
    assert 0 < after.metrics["clip_fraction"] < 1


# -- trees ----------------------------------------------------------------------------------------


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
    assert torch.equal(x[0, 0], x[3, 0]) and not torch.equal(x[0, 0], x[4, 0])
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
