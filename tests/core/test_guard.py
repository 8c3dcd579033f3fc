"""The guarded ratio, the divergence mask and the step weights by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmgrpo.core import Trajectories, credit, ratios
from mmgrpo.core.diffusion import linear_shift, sd3_shift, step_divergence, transition
from mmgrpo.core.trust_regions import divergence_mask, unclipped
from mmgrpo.methods import load_method

ONE = torch.ones(1, 1, dtype=torch.bool)


def test_the_worked_replay():
    """sigma .8 to .7, a .7, x .5, v -.3 then -.28, z 1.2."""
    x, v, now = (torch.tensor([[value]]).double() for value in (0.5, -0.3, -0.28))
    options = {"eta": 0.7, "sigma_max": 0.9}
    old, std = transition("flow_sde", v, x, 0.8, 0.7, **options)
    new, _ = transition("flow_sde", now, x, 0.8, 0.7, **options)
    x_next = old + 1.2 * std
    log_ratio = ((x_next - old) ** 2 - (x_next - new) ** 2) / (2 * std**2)
    moved = step_divergence("exact", now, v, 0.8, 0.7, kernel="flow_sde", **options)
    assert log_ratio.item() == pytest.approx(-0.006765, abs=1e-6)
    assert moved.item() == pytest.approx(1.5817e-5, rel=1e-4)
    guarded = ratios.guard(log_ratio, ONE, divergence=moved[:, None], step_std=std.reshape(1, 1))
    assert guarded.item() == pytest.approx(-0.002988, abs=1e-6)
    assert guarded.exp().item() == pytest.approx(0.997016, abs=1e-6)


def test_the_guarded_ratio_has_mean_zero_and_a_variance_without_std():
    """Over the noise z: mean 0 and variance mean(Dmu^2) / D, whatever s."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.linspace(-0.02, 0.05, 8).double()
    z = torch.randn(200_000, 8, generator=generator, dtype=torch.float64)
    for std in (0.1, 0.7):
        log_ratio = ((2 * z * shift * std - shift**2) / (2 * std**2)).mean(dim=1, keepdim=True)
        moved = (shift**2).mean() / (2 * std**2)
        guarded = ratios.guard(
            log_ratio, torch.ones_like(log_ratio), divergence=moved, step_std=torch.tensor(std)
        )
        spread = math.sqrt((shift**2).mean() / 8)
        assert guarded.mean().abs() < 4 * spread / 200_000**0.5
        assert guarded.std().item() == pytest.approx(spread, rel=0.01)


def test_guard_off_is_the_plain_ratio():
    log_ratio = torch.tensor([[0.3, -0.2]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    found = ratios.guard(log_ratio, mask, divergence=zero, step_std=one)
    assert torch.equal(found, ratios.token(log_ratio, mask))


def test_the_divergence_mask_cuts_only_what_has_gained():
    ratio = torch.tensor([[1.1, 1.1, 0.9, 0.9, 1.1, 0.9, 1.0]])
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0]])
    far = torch.tensor([[2e-5, 2e-5, 2e-5, 2e-5, 1e-6, 1e-6, 2e-5]])
    region = divergence_mask(ratio, advantage, far, delta=1e-5)
    assert region.kept.tolist() == [[False, True, True, False, True, True, True]]
    assert torch.equal(region.ratio, ratio * region.kept)
    free = divergence_mask(ratio, advantage, far, delta=math.inf)
    assert torch.equal(free.ratio, unclipped(ratio, advantage).ratio)
    # by hand: mean shifted by .0025 at std .442719
    moved = torch.tensor([[0.0025**2 / (2 * 0.442719**2)]])
    assert moved.item() == pytest.approx(1.5944e-5, rel=1e-4)
    assert not divergence_mask(ratio[:, :1], advantage[:, :1], moved).kept.item()


def test_the_mask_needs_its_divergence():
    with pytest.raises(ValueError, match="needs the divergence"):
        divergence_mask(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="delta must be positive"):
        divergence_mask(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), delta=0.0)


def denoising(sigmas: torch.Tensor, *, eta: float = 0.7, trained=None) -> Trajectories:
    """One sample whose steps follow a schedule; the last one draws no noise."""
    nothing = torch.zeros(len(sigmas) - 1)
    _, std = transition(
        "flow_sde", nothing, nothing, sigmas[:-1], sigmas[1:], eta=eta, sigma_max=sigmas[1]
    )
    std = torch.cat([std[:-1], torch.zeros(1)])[None]
    mask = std > 0 if trained is None else torch.tensor([trained])
    return Trajectories(
        group=torch.zeros(1), mask=mask, step_std=std, step_length=-sigmas.diff()[None]
    )


def test_the_published_step_weights():
    t = denoising(torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 0.0]))
    weights = credit.step_std(torch.ones(1), t)
    expected = [1.424858, 1.274431, 0.780427, 0.520284, 0.0]
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-5)
    alone = denoising(
        torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 0.0]), trained=[False, True, False, False, False]
    )
    assert credit.step_std(torch.ones(1), alone)[0].tolist() == pytest.approx(
        [0, 1.274431, 0, 0, 0], abs=1e-5
    )


def test_the_published_stds_of_the_sd3_schedule():
    t = denoising(sd3_shift(10))
    std = [0.7, 0.742964, 0.536152, 0.445897, 0.391794, 0.352797, 0.319070, 0.282007, 0.225360]
    assert t.step_std[0].tolist() == pytest.approx([*std, 0.0], abs=2e-6)
    weights = credit.step_std(torch.ones(1), t)[0, :9]
    assert (weights / t.step_std[0, :9]).tolist() == pytest.approx([1 / 0.444005] * 9, rel=1e-5)


def test_every_step_is_divided_by_its_length():
    t = denoising(linear_shift(10))
    found = credit.inverse_step_length(torch.tensor([2.0]), t)
    assert found[0, :9].tolist() == pytest.approx((2 / t.step_length[0, :9]).tolist())
    even = denoising(torch.tensor([1, 0.8, 0.7, 0.6, 0.0]))
    assert credit.inverse_step_length(torch.ones(1), even)[0, 1].item() == pytest.approx(10)


def test_steps_without_sizes_are_refused():
    t = Trajectories(group=torch.zeros(1), mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"needs trajectories\.step_std"):
        credit.step_std(torch.ones(1), t)


def test_guarded_methods_need_the_old_prediction_and_refuse_another_divergence():
    for name in ("grpo-guard", "flow-dppo"):
        method = load_method(name)
        assert method.needs == {"groups", "old_prediction"}
        request = method.request
        assert (request.divergence, request.divergence_target) == ("exact", "old")
        with pytest.raises(Exception, match="an evaluation has one divergence"):
            load_method(name, regulariser={"kl": {"estimator": "code", "coefficient": 0.1}})
    with pytest.raises(Exception, match="for denoising steps"):
        load_method("grpo", ratio="guard")
