"""Forward-process surrogates: the cards' numbers, identities, plain loops, finite differences."""

import math
import statistics

import pytest
import torch

from mmgrpo.core.matching_objectives import (
    centred_reward,
    group_preference,
    negative_aware,
    optimality,
)
from mmgrpo.core.objectives import Decisions, Matching
from mmgrpo.core.trust_regions import ppo_clip, unclipped


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def decisions(prediction, old, target, sigma, advantage, group=None, mask=None):
    """Rows of draws with velocities ``[B, T, ...]``; log-probabilities do not matter."""
    zero = torch.zeros_like(advantage)
    return Decisions(
        zero, zero, zero, advantage,
        matching=Matching(prediction, old, target, sigma),
        mask=torch.ones_like(advantage, dtype=torch.bool) if mask is None else mask,
        group=torch.zeros(len(advantage), dtype=torch.int64) if group is None else group,
    )  # fmt: skip


def random_decisions(seed=0, rows=6, draws=3, shape=(2, 2), **changes):
    stream = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=stream, dtype=torch.float64)

    made = {
        "prediction": draw(rows, draws, *shape),
        "old": draw(rows, draws, *shape),
        "target": draw(rows, draws, *shape),
        "sigma": torch.rand(rows, draws, generator=stream, dtype=torch.float64),
        "advantage": 3 * draw(rows, draws),
        "group": torch.arange(rows) // 3,
    }
    return decisions(**{**made, **changes})


# -- DiffusionNFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("self_normalised", "loss"), [(True, 0.2125), (False, 0.011875)])
def test_numbers_of_the_nft_card(self_normalised, loss):
    """x0 .2, noise 1, t .5; the loss is of clean predictions x_t - t v."""
    one = decisions(
        tensor([[[0.75]]]), tensor([[[0.7]]]), tensor([[[0.8]]]), tensor([[0.5]]), tensor([[1.5]])
    )
    assert optimality(tensor(1.5), 5.0).item() == pytest.approx(0.65)
    found = negative_aware(one, self_normalised=self_normalised)
    assert found.loss.item() == pytest.approx(loss, abs=1e-12)
    assert found.kept.all()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("self_normalised", [True, False])
def test_an_indifferent_sample_has_no_gradient_at_the_old_policy(beta, self_normalised):
    start = random_decisions(advantage=torch.zeros(6, 3, dtype=torch.float64))
    moving = start.matching.old_prediction.clone().requires_grad_()
    same = start._replace(matching=start.matching._replace(prediction=moving))
    negative_aware(same, beta=beta, self_normalised=self_normalised).loss.sum().backward()
    assert moving.grad.abs().max() < 1e-14
    far = start._replace(advantage=torch.ones(6, 3, dtype=torch.float64))
    far = far._replace(matching=far.matching._replace(prediction=moving))
    negative_aware(far, beta=beta, self_normalised=self_normalised).loss.sum().backward()
    assert moving.grad.abs().max() > 1e-3


def test_the_best_sample_is_fitted_as_in_pretraining():
    """r = 1 and beta 1 leave sigma^2 (v - target)^2, times A_max."""
    start = random_decisions(advantage=torch.full((6, 3), 7.0, dtype=torch.float64))
    matching = start.matching
    plain = ((matching.prediction - matching.target) ** 2).mean(dim=(2, 3)) * matching.sigma**2
    found = negative_aware(start, self_normalised=False, bound=5.0).loss
    torch.testing.assert_close(found, 5 * plain)


@pytest.mark.parametrize("objective", [negative_aware, centred_reward])
def test_a_good_sample_is_moved_towards_and_a_bad_one_away(objective):
    for advantage, sign in ((4.0, 1), (-4.0, -1)):
        values = tensor([[advantage], [-advantage]])
        start = random_decisions(rows=2, draws=1, advantage=values)
        moving = start.matching.old_prediction.clone().requires_grad_()
        same = start._replace(matching=start.matching._replace(prediction=moving))
        objective(same).loss[0].sum().backward()
        towards = (start.matching.target - moving.detach())[0]
        assert sign * float((-moving.grad[0] * towards).sum()) > 0


WEIGHT = torch.linspace(0.5, 2.0, 18, dtype=torch.float64).view(6, 3)
"""Of each row and draw: with equal ones the gradient of a group's mean would be 0."""


@pytest.mark.parametrize("objective", [negative_aware, centred_reward])
@pytest.mark.parametrize("self_normalised", [True, False])
def test_gradients_against_finite_differences(objective, self_normalised):
    """Of uneven weights of the loss, with what carries no gradient held at its value."""
    start, step = random_decisions(3), 1e-6
    moving = start.matching.prediction.clone().requires_grad_()
    moved = start._replace(matching=start.matching._replace(prediction=moving))
    loss = objective(moved, self_normalised=self_normalised, beta=0.7).loss
    (found,) = torch.autograd.grad((loss * WEIGHT).sum(), moving)
    reference = plain_gradient(start, objective.__name__, self_normalised, 0.7, step)
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-7)


def plain_gradient(start, name, self_normalised, beta, step):
    """Central differences of the plain form, whose weights and means are frozen."""
    frozen = start.matching.prediction
    found = torch.zeros_like(frozen)
    for place in range(frozen.numel()):
        values = []
        for sign in (1, -1):
            moved = frozen.clone()
            moved.view(-1)[place] += sign * step
            loss = tensor(plain(start, name, moved, self_normalised, beta))
            values.append(float((loss * WEIGHT).sum()))
        found.view(-1)[place] = (values[0] - values[1]) / (2 * step)
    return found


def plain(start, name, moved, self_normalised, beta, bound=5.0):
    """Both losses once more, as loops over floats; ``moved`` is the prediction."""
    matching = start.matching
    rows, draws = matching.sigma.shape
    frozen, old, target = matching.prediction, matching.old_prediction, matching.target

    def error(velocity, weigh, i, t, level):
        gaps = [level * float(g) for g in (velocity[i, t] - target[i, t]).flatten()]
        scale = [level * abs(float(g)) for g in (weigh[i, t] - target[i, t]).flatten()]
        weight = max(statistics.fmean(scale), 1e-5) if self_normalised else 1.0
        return statistics.fmean(g * g for g in gaps) / weight

    def good(i, t):
        return min(max(float(start.advantage[i, t]) / (2 * bound) + 0.5, 0), 1)

    def implicit(velocity, i, t):
        return error(old, old, i, t, 1.0) - error(velocity, frozen, i, t, 1.0)

    def nft(i, t):
        level, r = float(matching.sigma[i, t]), good(i, t)
        plus, minus = (s * moved + (1 - s) * old for s in (beta, -beta))
        at = [s * frozen + (1 - s) * old for s in (beta, -beta)]
        return (
            bound
            / beta
            * (r * error(plus, at[0], i, t, level) + (1 - r) * error(minus, at[1], i, t, level))
        )

    def crd(i, t):
        group = [j for j in range(rows) if start.group[j] == start.group[i] and start.mask[j, t]]
        mean = statistics.fmean(implicit(frozen, j, t) for j in group)
        wanted = good(i, t) - statistics.fmean(good(j, t) for j in group)
        return bound / beta * (beta * (implicit(moved, i, t) - mean) - wanted) ** 2

    one = {"negative_aware": nft, "centred_reward": crd}[name]
    return [[one(i, t) for t in range(draws)] for i in range(rows)]


@pytest.mark.parametrize("objective", [negative_aware, centred_reward])
@pytest.mark.parametrize("self_normalised", [True, False])
def test_losses_against_loops_over_floats(objective, self_normalised):
    start = random_decisions(5)
    prediction = start.matching.prediction
    wanted = plain(start, objective.__name__, prediction, self_normalised, 0.7)
    found = objective(start, self_normalised=self_normalised, beta=0.7).loss
    torch.testing.assert_close(found, tensor(wanted), rtol=1e-12, atol=1e-12)


# -- CRD ------------------------------------------------------------------------------------------


def test_centring_is_per_group_and_draw_over_trained_rows():
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[0, 1] = False
    start = random_decisions(7, mask=mask)
    found = centred_reward(start).loss
    torch.testing.assert_close(
        found[mask],
        tensor(plain(start, "centred_reward", start.matching.prediction, False, 1.0))[mask],
    )
    alone = Decisions(*(x[3:] if torch.is_tensor(x) else x for x in start))
    alone = alone._replace(matching=Matching(*(x[3:] for x in start.matching)))
    torch.testing.assert_close(centred_reward(alone).loss, found[3:])


def test_a_policy_whose_implicit_rewards_are_the_rewards_has_no_loss():
    target = torch.zeros(3, 1, 1, dtype=torch.float64)
    old = torch.full_like(target, 2.0)
    advantage = tensor([[2.0], [-1.0], [0.5]])
    reward = optimality(advantage, 5.0)
    prediction = (4 - reward / 0.5)[..., None].sqrt()  # beta (old error - error) = reward
    start = decisions(prediction, old, target, torch.ones(3, 1), advantage)
    assert centred_reward(start, beta=0.5).loss.abs().max() < 1e-14


# -- DGPO -----------------------------------------------------------------------------------------


def preference(errors, ref, advantage, *, beta=100.0, region=unclipped, old=None):
    """Loss and gradient in the errors of one group at one draw."""
    log_prob = -tensor(errors)[:, None]
    log_prob.requires_grad_()
    old = log_prob.detach() if old is None else -tensor(old)[:, None]
    found = group_preference(
        Decisions(
            log_prob - old, log_prob, old, tensor(advantage)[:, None],
            ref_log_prob=-tensor(ref)[:, None],
            mask=torch.ones(len(errors), 1, dtype=torch.bool),
            group=torch.zeros(len(errors), dtype=torch.int64),
        ),
        trust_region=region, beta=beta,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.loss.sum(), log_prob)
    return found.loss.flatten(), -gradient.flatten(), found.kept.flatten()


def test_numbers_of_the_dgpo_card():
    loss, gradient, _ = preference([0.49, 0.62], [0.50, 0.60], [1.0, -1.0])
    weight = 1 / (1 + math.exp(1.5))
    assert weight == pytest.approx(0.182426, abs=5e-7)
    assert loss.tolist() == pytest.approx([0.182426 * 0.49, -0.182426 * 0.62], abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.182426, -0.182426], abs=1e-6)


def test_at_the_reference_every_group_counts_half():
    _, gradient, _ = preference([0.5, 0.6, 0.1], [0.5, 0.6, 0.1], [1.0, 0.5, -1.5])
    assert gradient.tolist() == pytest.approx([0.5, 0.25, -0.75])


def test_outside_the_trust_region_the_loss_stays_and_the_gradient_goes():
    def region(ratio, advantage, divergence):
        return ppo_clip(ratio, advantage, divergence, low=0.1, high=0.1)

    errors, old = [0.2, 0.9, 0.55], [0.5, 0.5, 0.5]
    free, _, _ = preference(errors, errors, [1.0, -1.0, 0.3], old=old)
    loss, gradient, kept = preference(errors, errors, [1.0, -1.0, 0.3], old=old, region=region)
    torch.testing.assert_close(loss, free)
    assert kept.tolist() == [False, False, True]
    assert gradient.tolist() == pytest.approx([0, 0, 0.15])


# -- refusals -------------------------------------------------------------------------------------


def test_numbers_that_are_not_positive_are_refused():
    for objective in (negative_aware, centred_reward):
        with pytest.raises(ValueError, match="positive"):
            objective(random_decisions(), bound=0.0)
    with pytest.raises(ValueError, match="positive"):
        preference([0.1], [0.1], [1.0], beta=-1.0)


def test_what_is_missing_is_named():
    bare = random_decisions()._replace(matching=None)
    with pytest.raises(ValueError, match="predictions"):
        negative_aware(bare)
    with pytest.raises(ValueError, match="ref_log_prob"):
        group_preference(bare, trust_region=unclipped)
