"""Each preset's advantages, loss and gradient against an independent float64 reference."""

import pytest
import torch
from method_batches import PRESETS, load_method, loss_and_gradient, make_batch
from method_references import REFERENCES, Plain, difference_quotients

BATCHES = [(0, False), (1, False), (2, True)]


def test_every_preset_has_an_independent_reference():
    assert set(PRESETS) == set(REFERENCES)


@pytest.mark.parametrize(("seed", "alone"), BATCHES)
@pytest.mark.parametrize("name", PRESETS)
def test_advantages_loss_and_gradient(name, seed, alone):
    method, batch = load_method(name), make_batch(seed, alone=alone)
    plain, log_prob = Plain.of(batch.trajectories), batch.log_prob.tolist()
    advantage, loss = REFERENCES[name](plain, log_prob, log_prob)

    prepared = method.prepare(batch.trajectories)
    wanted = torch.zeros_like(batch.log_prob)
    for place, value in advantage.items():
        wanted[place] = value
    torch.testing.assert_close(prepared.advantage, wanted, rtol=1e-10, atol=1e-12)
    assert prepared.advantage.dtype == torch.float64

    output, gradient = loss_and_gradient(method, batch, prepared)
    assert output.loss.dtype == torch.float64
    assert output.loss.item() == pytest.approx(loss, rel=1e-10, abs=1e-13)
    assert output.metrics["loss"] == output.loss.item()
    quotients = difference_quotients(REFERENCES[name], plain, log_prob)
    torch.testing.assert_close(
        gradient, torch.tensor(quotients, dtype=torch.float64), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", PRESETS)
def test_the_batches_are_off_policy_on_both_sides_of_the_clip(name):
    """Otherwise the comparison above would prove little."""
    method, batch = load_method(name), make_batch(0)
    output, _ = loss_and_gradient(method, batch)
    assert output.max_log_ratio > 0.3
    unclipped = {"reinforce", "negative_aware", "centred_reward"}
    if "pairs" in method.needs:  # their ratios are to the reference, which is far off everywhere
        return
    if method.component("objective") not in unclipped and name != "cispo":
        assert 0.02 < output.metrics["clip_fraction"] < 0.8
