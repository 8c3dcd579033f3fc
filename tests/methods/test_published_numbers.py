"""Worked numbers of presets: advantages, and what holds their policies back."""

from __future__ import annotations

import pytest
import torch

from mmgrpo.core import Trajectories
from mmgrpo.core.divergence import squared_gap
from mmgrpo.errors import MethodError
from mmgrpo.methods import load_method
from mmgrpo.protocols import Evaluation


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch(rewards, decisions=1, **fields):
    """One group."""
    size = len(rewards)
    return Trajectories(
        group=torch.zeros(size, dtype=torch.int64),
        mask=torch.ones(size, decisions),
        rewards={"score": tensor(*rewards)},
        **fields,
    )


def test_simplear_s_advantages():
    """Four CLIP cosines: mean .25, sample std .0383."""
    found = load_method("simplear").prepare(batch([0.20, 0.24, 0.28, 0.28])).advantage[:, 0]
    assert found.tolist() == pytest.approx([-1.3022, -0.2604, 0.7813, 0.7813], abs=5e-5)
    assert float(found.sum()) == pytest.approx(0, abs=1e-12)


# -- DanceGRPO's best of N ------------------------------------------------------------------------


def test_of_24_the_4_best_and_the_4_worst_are_trained():
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(3)).double().tolist()
    whole = load_method("dance-grpo").prepare(batch(rewards, 3))
    kept = [{"name": "best_and_worst"}]
    found = load_method("dance-grpo", filter=kept).prepare(batch(rewards, 3))
    order = sorted(range(24), key=rewards.__getitem__)
    assert found.mask.all(dim=1).nonzero().flatten().tolist() == sorted(order[:4] + order[-4:])
    assert found.mask.sum() == 8 * 3
    rows = found.mask.any(dim=1)
    assert torch.equal(found.advantage[rows], whole.advantage[rows])  # compared with all 24
    few = load_method("dance-grpo", filter=kept).prepare(batch(rewards[:7], 3))
    assert few.mask.all()
    with pytest.raises(ValueError, match="count must be at least 1"):
        load_method("dance-grpo", filter=[{"name": "best_and_worst", "count": 0}]).prepare(
            batch(rewards)
        )


# -- KL terms in velocity space -------------------------------------------------------------------


def matched(rewards, new, old, ref):
    """Prepared draws on clean samples, of one element; and what the policy predicts there."""
    size = len(rewards)

    def field(value):
        return torch.full((size, 1, 1), value, dtype=torch.float64)

    zero = torch.zeros(size, 1, dtype=torch.float64)
    found = batch(
        rewards, old_log_prob=zero, ref_log_prob=zero, old_prediction=field(old),
        ref_prediction=field(ref), target=field(0.0), sigma=zero + 0.5,
    )  # fmt: skip
    prediction = field(new).requires_grad_()
    gap = squared_gap(prediction, field(ref))
    return found, Evaluation(zero, divergence=gap, prediction=prediction)


def test_awm_is_held_to_the_average_and_a_thousand_times_weaker_to_the_base():
    """v -.28 against -.30 is the worked velocity KL of 4e-4; its gradient is 2 x .02 x .001."""
    method = load_method("awm", regulariser={"kl": {"coefficient": 0.0}})
    found, evaluation = matched([0.5, 0.5], new=-0.28, old=-0.1, ref=-0.3)
    assert {"old_prediction", "ref_prediction"} & method.needs == {"ref_prediction"}
    assert {"old_prediction", "ref_prediction"} <= load_method("awm").needs
    output = method.loss(evaluation.log_prob, method.prepare(found), evaluation=evaluation)
    assert output.metrics["ref_velocity"] == pytest.approx(4e-4)
    assert output.loss.item() == pytest.approx(4e-7)
    (gradient,) = torch.autograd.grad(output.loss, evaluation.prediction)
    assert gradient.flatten().tolist() == pytest.approx([2 * 0.02 * 1e-3 / 2] * 2)
    plain = load_method("awm", regulariser={"ref_velocity": 0.0})
    assert "ref_prediction" not in plain.needs
    assert not plain.request.prediction


def test_what_the_second_term_cannot_do_is_refused():
    with pytest.raises(MethodError, match="ref_velocity is for denoisers"):
        load_method("grpo", regulariser={"ref_velocity": 0.1})
    with pytest.raises(MethodError, match=r"floor is 0.2, above the coefficient 0.1"):
        load_method("crd", regulariser={"kl": {"floor": 0.2}})
    assert (
        "ref_prediction" not in load_method("crd", regulariser={"kl": {"coefficient": 0.0}}).needs
    )
    method = load_method("awm")
    found, evaluation = matched([0.5, 0.5], new=0.0, old=0.0, ref=0.0)
    prepared = method.prepare(found).replace(ref_prediction=None)
    with pytest.raises(ValueError, match=r"needs evaluation.prediction and trajectories.ref"):
        method.loss(evaluation.log_prob, prepared, evaluation=evaluation)


@pytest.mark.parametrize(("advantage", "weight"), [(-5.0, 1e-4), (0.0, 0.05005), (5.0, 0.1),
                                                   (-9.0, 1e-4), (2.5, 0.075025)])  # fmt: skip
def test_crd_s_kl_grows_with_the_reward(advantage, weight):
    """1e-4 + r (.1 - 1e-4), r = A / 10 + 1 / 2 in [0, 1]."""
    found, evaluation = matched([0.5, 0.5], new=0.2, old=0.2, ref=0.0)
    method = load_method("crd")
    prepared = method.prepare(found)
    prepared = prepared.replace(advantage=torch.full_like(prepared.advantage, advantage))
    output = method.loss(evaluation.log_prob, prepared, evaluation=evaluation)
    assert output.metrics["kl"] == pytest.approx(0.04)
    assert output.loss.item() == pytest.approx(weight * 0.04)  # equal rewards: nothing to regress
    constant = load_method("crd", regulariser={"kl": {"floor": None}})
    output = constant.loss(evaluation.log_prob, prepared, evaluation=evaluation)
    assert output.loss.item() == pytest.approx(0.1 * 0.04)


# -- VRPO's supervised term -----------------------------------------------------------------------


def test_vrpo_s_supervised_term_is_per_token_of_the_preferred_response():
    """Two views of 4 tokens, t .5 with a token of p .6 and t .25 with one of p .5: B = -1.8971."""
    views = tensor(2, 4) * tensor(0.6, 0.5).log()
    assert float(views.mean()) == pytest.approx(-1.8971, abs=5e-5)
    log_prob = torch.stack([views, tensor(-7.0, -9.0)])
    found = batch([1.0, 0.0], 2, old_log_prob=log_prob, ref_log_prob=log_prob, tokens=tensor(4, 9))
    method = load_method("vrpo-llada")
    value = method.loss(log_prob, method.prepare(found)).loss.item()
    assert value == pytest.approx(torch.tensor(2.0).log().item() + 0.05 * 1.8971 / 4, abs=1e-6)
