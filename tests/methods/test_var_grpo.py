"""VAR-GRPO: the card's gradient weights, and what the method is when a scale is one code."""

import pytest
import torch
from method_batches import load_method, loss_and_gradient, make_batch

from mmgrpo.core import Trajectories

BY_SCALE = {"aggregate": "sequence_mean_segment_mean"}


def weights(segment, **overrides):
    """Gradient of minus the loss at ratio 1 and advantage 1, one sample."""
    segment = torch.tensor([segment])
    log_prob = torch.full(segment.shape, -1.0, dtype=torch.float64).requires_grad_()
    t = Trajectories(
        group=torch.zeros(1),
        mask=torch.ones_like(segment).bool(),
        old_log_prob=log_prob.detach(),
        ref_log_prob=log_prob.detach(),
        advantage=torch.ones_like(log_prob.detach()),
        segment=segment,
    )
    loss = load_method("var-grpo", **overrides).loss(log_prob, t).loss
    return (-torch.autograd.grad(loss, log_prob)[0][0]).tolist()


def test_the_card_s_weights():
    assert weights([0, 1, 1, 1, 1]) == pytest.approx([0.2] * 5)
    assert weights([0, 1, 1, 1, 1], **BY_SCALE) == pytest.approx([0.5, *[0.125] * 4])


def test_scales_of_one_code_are_plain_token_grpo():
    assert weights([0, 1, 2, 3], **BY_SCALE) == pytest.approx(weights([0, 1, 2, 3]))
    batch = make_batch(0)
    alone = torch.arange(batch.trajectories.mask.shape[1]).expand_as(batch.trajectories.mask)
    single = type(batch)(batch.trajectories.replace(segment=alone), batch.log_prob)
    found = loss_and_gradient(load_method("var-grpo", **BY_SCALE), single)[1]
    plain = load_method("var-grpo", aggregate="sequence_mean_token_mean")
    torch.testing.assert_close(found, loss_and_gradient(plain, single)[1])


def test_holes_take_no_part_in_a_scale():
    """Sum over scales of the mean over what is there, in plain loops."""
    batch = make_batch(1)
    method = load_method("var-grpo", **BY_SCALE)
    prepared = method.prepare(batch.trajectories)
    _, gradient = loss_and_gradient(method, batch, prepared)
    flat = load_method("var-grpo")
    _, token = loss_and_gradient(flat, batch, prepared)
    total = int(prepared.mask.sum())
    for i, row in enumerate(prepared.mask.tolist()):
        there = [t for t, on in enumerate(row) if on]
        scale = {t: int(prepared.segment[i, t]) for t in there}
        for t in there:
            same = sum(scale[u] == scale[t] for u in there)
            share = 1 / (len(row_count(prepared.mask)) * len(set(scale.values())) * same)
            assert float(gradient[i, t]) == pytest.approx(float(token[i, t]) * total * share)


def row_count(mask):
    return [row for row in mask.tolist() if any(row)]


def test_scales_are_asked_for_where_they_count():
    assert "segment" in load_method("var-grpo", **BY_SCALE).needs
    assert "segment" not in load_method("var-grpo").needs
    assert (
        "ref_log_prob" not in load_method("var-grpo", **{"regulariser.kl.coefficient": 0.0}).needs
    )
    batch = make_batch(0)
    method = load_method("var-grpo", **BY_SCALE)
    bare = type(batch)(batch.trajectories.replace(segment=None), batch.log_prob)
    with pytest.raises(ValueError, match=r"needs trajectories.segment"):
        loss_and_gradient(method, bare)
