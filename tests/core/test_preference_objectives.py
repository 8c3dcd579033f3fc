"""Preference losses: the published numbers, plain logarithms, and what must not matter."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mmgrpo.core.objectives import Decisions
from mmgrpo.core.preference_objectives import preference, semi_preference, spread, step_preference

OBJECTIVES = (preference, step_preference, semi_preference)
PAIR = [[0, 1]]


def decisions(log_prob, ref, mask=None, pairs=PAIR):
    log_prob, ref = (torch.as_tensor(x, dtype=torch.float64) for x in (log_prob, ref))
    mask = torch.ones(log_prob.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    zero = torch.zeros_like(ref)
    return Decisions(
        zero, log_prob, zero, zero, ref_log_prob=ref, mask=mask, pairs=torch.tensor(pairs)
    )


def errors(preferred, rejected):
    """One shared draw: (error of the policy, of the reference) for each of the two."""
    return decisions([[-preferred[0]], [-rejected[0]]], [[-preferred[1]], [-rejected[1]]])


def loss(objective, *args, **options):
    found = objective(*args, **options).loss
    assert torch.equal(found[0], found[1])
    return found[0, 0].item()


def test_published_numbers():
    d3po = decisions([[0.05], [-0.2]], [[0.0], [0.0]])
    assert loss(step_preference, d3po, beta=0.1, clip=0.1) == pytest.approx(0.6854, abs=5e-5)
    draw = errors((0.1000, 0.1010), (0.2000, 0.1995))
    assert loss(step_preference, draw, beta=1000.0) == pytest.approx(0.201413, abs=5e-7)
    assert loss(semi_preference, draw, beta=1000.0) == pytest.approx(0.201413, abs=5e-7)
    elbo = decisions([[-10.0], [-12.0]], [[-10.5], [-11.8]])
    assert loss(preference, elbo, beta=0.2) == pytest.approx(0.6256, abs=5e-5)
    text = decisions([[0.5, 0.3], [-0.1, -0.3]], torch.zeros(2, 2))  # 0.8 against -0.4
    assert loss(preference, text, beta=0.1) == pytest.approx(0.634946, abs=5e-7)
    assert loss(preference, text, beta=0.1, label_smoothing=0.1) == pytest.approx(
        0.646946, abs=5e-7
    )


def test_the_sign_turns_where_the_reference_is_better_on_the_preferred_sample():
    loses = errors((0.1005, 0.1000), (0.2000, 0.2010))  # m_w = -.0005, m_r = .001
    assert loss(semi_preference, loses, beta=1000.0) == pytest.approx(0.474077, abs=5e-7)
    better = errors((0.1010, 0.1000), (0.2000, 0.1995))  # m_w = -.001, m_r = -.0005
    margin = {"sign": -0.001 - 0.0005, "drop": -0.001}
    for flip, value in margin.items():
        wanted = math.log1p(math.exp(-1000 * value))
        assert loss(semi_preference, better, flip=flip) == pytest.approx(wanted, rel=1e-9)


def test_a_tie_on_the_anchor_counts_as_a_weaker_reference():
    tie = errors((0.1, 0.1), (0.2000, 0.1995))
    wanted = math.log1p(math.exp(-1000 * 0.0005))
    assert loss(semi_preference, tie) == pytest.approx(wanted, rel=1e-9)


def test_the_sign_is_found_for_each_draw():
    both = decisions([[-0.1, -0.2], [-0.3, -0.3]], [[-0.2, -0.1], [-0.2, -0.2]])
    found = semi_preference(both, beta=10.0).loss[0].tolist()
    wanted = [math.log1p(math.exp(-10 * (0.1 + 0.1))), math.log1p(math.exp(-10 * (-0.1 - 0.1)))]
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_the_reference_the_loss_is_ln_2(objective):
    generator = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(4, 3, generator=generator, dtype=torch.float64)
    found = objective(decisions(log_prob, log_prob, pairs=[[0, 1], [3, 2]])).loss
    torch.testing.assert_close(found, torch.full_like(found, math.log(2)))


@pytest.mark.parametrize("options", [{}, {"mean": True}, {"label_smoothing": 0.2}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_by_finite_differences(objective, options):
    if objective is not preference:
        options = {name: value for name, value in options.items() if name == "label_smoothing"}
        options = {} if objective is semi_preference else options
    generator = torch.Generator().manual_seed(1)
    ref = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    moved = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    mask = [[True, True, True], [True, False, True], [False, True, True], [True, True, False]]

    def value(log_prob):
        given = decisions(ref, ref, mask, [[0, 1], [2, 3]])._replace(log_prob=log_prob)
        return objective(given, beta=1.5, **options).loss

    assert gradcheck(value, (ref + 0.1 * moved).requires_grad_())


def gradient(objective, given, **options):
    log_prob = given.log_prob.clone().requires_grad_()
    found = objective(given._replace(log_prob=log_prob), **options).loss.sum()
    return torch.autograd.grad(found, log_prob)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_the_reference_the_gradient_is_half_of_beta_and_turns_with_the_pair(objective):
    """Each row carries the pair's loss, so their sum has twice the gradient of one."""
    given = decisions([[-1.0], [-2.0]], [[-1.0], [-2.0]])
    turned = given._replace(pairs=torch.tensor([[1, 0]]))
    assert gradient(objective, given, beta=3.0).flatten().tolist() == pytest.approx([-3, 3])
    assert gradient(objective, turned, beta=3.0).flatten().tolist() == pytest.approx([3, -3])


def test_a_clipped_ratio_has_no_gradient_and_is_counted():
    given = decisions([[0.05], [-0.2]], [[0.0], [0.0]])
    found = gradient(step_preference, given, clip=0.1)
    assert found[0] != 0
    assert found[1] == 0
    assert step_preference(given, clip=0.1).kept.tolist() == [[True], [False]]
    assert step_preference(given).kept.all()


def test_steps_that_only_one_of_the_two_has_do_not_count():
    mask = [[True, True, False], [True, False, True]]
    one = decisions([[0.1, 5.0, 9.0], [0.3, 9.0, 7.0]], torch.zeros(2, 3), mask)
    found = step_preference(one, beta=1.0).loss
    assert found[:, 0].tolist() == pytest.approx([math.log1p(math.exp(0.2))] * 2)
    assert (found[:, 1:] == 0).all()


def test_a_sequence_has_its_loss_at_every_decision_and_reads_only_its_own():
    mask = [[True, True, True], [True, False, False]]
    one = decisions([[0.1, 0.2, 0.3], [0.4, 77.0, 77.0]], torch.zeros(2, 3), mask)
    summed = preference(one, beta=1.0).loss
    torch.testing.assert_close(summed, torch.full_like(summed, math.log1p(math.exp(-0.2))))
    averaged = preference(one, beta=1.0, mean=True).loss
    torch.testing.assert_close(averaged, torch.full_like(averaged, math.log1p(math.exp(0.2))))


def test_margin_and_accuracy_tell_how_far_the_pairs_are_apart():
    log_prob = [[0.3, -0.1], [0.1, 0.0], [0.2, 0.5], [0.2, 0.1]]
    given = decisions(log_prob, torch.zeros(4, 2), pairs=[[0, 1], [2, 3]])
    steps = step_preference(given, beta=2.0).metrics
    assert steps["preference/margin"][0].tolist() == pytest.approx([0.4, -0.2])
    assert steps["preference/accuracy"].tolist() == [[1, 0], [1, 0], [0.5, 1], [0.5, 1]]
    whole = preference(given, beta=2.0).metrics
    assert whole["preference/margin"][2].tolist() == pytest.approx([0.8, 0.8])
    assert (whole["preference/accuracy"] == 1).all()
    flipped = semi_preference(given, beta=2.0).metrics["preference/margin"]
    torch.testing.assert_close(flipped, steps["preference/margin"])


def test_rows_of_several_pairs_carry_the_mean_of_theirs():
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    valid = torch.tensor([[True, True], [True, False]])
    found = spread(value, valid, torch.tensor([[0, 1], [0, 2]]), 4)
    assert found.tolist() == [[2, 2], [1, 2], [3, 0], [0, 0]]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gap", ["ref_log_prob", "pairs"])
def test_what_is_missing_is_named(objective, gap):
    named = {"ref_log_prob": "reference", "pairs": "pairs"}[gap]
    with pytest.raises(ValueError, match=named):
        objective(errors((0.1, 0.1), (0.1, 0.1))._replace(**{gap: None}))


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (step_preference, {"clip": 1.0}, "clip must be in"),
        (step_preference, {"label_smoothing": 0.5}, "label_smoothing must be in"),
        (preference, {"label_smoothing": -0.1}, "label_smoothing must be in"),
    ],
)
def test_options_out_of_range_are_refused(objective, options, message):
    with pytest.raises(ValueError, match=message):
        objective(errors((0.1, 0.1), (0.1, 0.1)), **options)
