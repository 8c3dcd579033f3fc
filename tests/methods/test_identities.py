"""What the cards say a method reduces to, and what every method does on policy."""

import pytest
import torch
from method_batches import (
    PRESETS,
    UNIFORM_GROUP,
    Batch,
    load_method,
    loss_and_gradient,
    make_batch,
    relative_error,
    select,
)

from mmgrpo.core import Trajectories

PLAIN = {"objective": "reinforce", "trust_region": None, "ratio": None, "regulariser": None}
UNREGULARISED = [
    name
    for name in PRESETS
    if load_method(name).component("ratio") == "token"
    and not load_method(name).needs & {"pairs", "whole_groups"}
    and not load_method(name).request.prediction
]


def advantage(name, batch, **overrides):
    return load_method(name, **overrides).prepare(batch.trajectories).advantage


def gradient(name, batch, **overrides):
    return loss_and_gradient(load_method(name, **overrides), batch)[1]


def even_batch(seed=0, groups=3, size=4, length=3, **fields):
    """Groups of one size and samples of one length."""
    batch = make_batch(seed)
    rows = groups * size
    return Batch(
        Trajectories(
            group=torch.arange(rows) // size,
            mask=torch.ones(rows, length),
            old_log_prob=batch.trajectories.old_log_prob[:rows, :1].expand(rows, length),
            reward=batch.trajectories.rewards["score"][:rows],
            **fields,
        ),
        batch.log_prob[:rows, :1].expand(rows, length),
    )


# -- on policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(name):
    output, _ = loss_and_gradient(load_method(name), make_batch(on_policy=True))
    assert output.metrics["ratio/mean"] == pytest.approx(1, abs=1e-12)
    if "pairs" not in load_method(name).needs:  # D3PO clips the ratio to the reference
        assert output.metrics["clip_fraction"] == 0
    assert output.metrics["policy/approximate_kl"] == pytest.approx(0, abs=1e-12)
    assert output.max_log_ratio == 0


@pytest.mark.parametrize("name", PRESETS)
def test_without_an_old_policy_the_policy_is_its_own(name):
    method, batch = load_method(name), make_batch(on_policy=True)
    prepared = method.prepare(batch.trajectories)
    output, found = loss_and_gradient(method, batch, prepared.replace(old_log_prob=None))
    wanted, expected = loss_and_gradient(method, batch, prepared)
    assert output.loss == wanted.loss
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", UNREGULARISED)
def test_on_policy_the_gradient_is_the_plain_policy_gradient(name):
    batch = make_batch(on_policy=True)
    found = gradient(name, batch, regulariser=None)
    assert relative_error(found, gradient(name, batch, **PLAIN)) < 1e-12
    assert found.norm() > 0


def test_on_policy_gspo_has_the_gradient_of_grpo():
    batch = make_batch(on_policy=True)
    plain = gradient("grpo", batch, regulariser=None)
    assert relative_error(gradient("gspo", batch), plain) < 1e-12


def test_on_policy_rloo_sums_the_log_probabilities_of_the_response():
    batch = make_batch(on_policy=True)
    summed = {**PLAIN, "aggregate": "sequence_mean_token_sum"}
    assert relative_error(gradient("rloo", batch), gradient("rloo", batch, **summed)) < 1e-12


def test_cpgd_starts_like_grpo():
    """The drift has coefficient 0 there."""
    batch = make_batch(on_policy=True)
    grpo = gradient("grpo", batch, regulariser=None, aggregate="token_mean")
    assert relative_error(gradient("cpgd", batch), grpo) < 1e-12


# -- reductions -----------------------------------------------------------------------------------


def test_dr_grpo_is_rloo_times_g_minus_one_over_g():
    batch = even_batch()
    rloo = advantage("rloo", batch, reward=None)
    torch.testing.assert_close(advantage("dr-grpo", batch), rloo * 3 / 4)


def test_loop_is_rloo_without_its_kl():
    batch = even_batch()
    torch.testing.assert_close(advantage("loop", batch), advantage("rloo", batch, reward=None))


def test_opo_on_equal_lengths_is_dr_grpo():
    batch = even_batch()
    torch.testing.assert_close(advantage("opo", batch), advantage("dr-grpo", batch))


def test_gpg_without_uniform_groups_is_dr_grpo_with_a_token_mean():
    batch = make_batch(on_policy=True)
    batch = select(batch, batch.trajectories.group != UNIFORM_GROUP)
    dr_grpo = gradient("dr-grpo", batch, aggregate="token_mean")
    assert relative_error(gradient("gpg", batch), dr_grpo) < 1e-12


def test_gpg_with_the_std_is_grpo_on_policy():
    batch = even_batch()
    batch = Batch(batch.trajectories, batch.trajectories.old_log_prob)
    gpg = gradient("gpg", batch, advantage={"scale": "group", "valid_group_factor": None})
    grpo = gradient("grpo", batch, regulariser=None, aggregate="token_mean")
    assert relative_error(gpg, grpo) < 1e-12


def test_gspo_on_single_decisions_is_grpo_with_its_clip():
    batch = even_batch(length=1)
    grpo = gradient("grpo", batch, regulariser=None, trust_region={"low": 3e-4, "high": 4e-4})
    assert relative_error(gradient("gspo", batch), grpo) < 1e-12


def test_the_token_form_of_gspo_has_its_gradient():
    batch = make_batch()
    token_form = gradient("gspo", batch, ratio={"straight_through": True})
    sequence_form = gradient("gspo", batch)
    assert relative_error(token_form, sequence_form) < 1e-12


def test_dapo_with_equal_clips_and_sequence_mean_is_grpo():
    batch = make_batch()
    dapo = gradient(
        "dapo",
        batch,
        filter=None,
        trust_region={"high": 0.2},
        aggregate="sequence_mean_token_mean",
    )
    assert relative_error(dapo, gradient("grpo", batch, regulariser=None)) < 1e-12


def test_dr_grpo_with_std_and_sequence_mean_is_grpo():
    batch = make_batch()
    dr_grpo = gradient(
        "dr-grpo",
        batch,
        advantage={"scale": "group"},
        aggregate="sequence_mean_token_mean",
    )
    assert relative_error(dr_grpo, gradient("grpo", batch, regulariser=None)) < 1e-12


def test_cispo_below_its_cap_is_the_unclipped_policy_gradient():
    batch = make_batch()
    low = batch.log_prob - batch.trajectories.old_log_prob < 1.6  # exp(1.6) < 5
    log_prob = torch.where(low, batch.log_prob, batch.trajectories.old_log_prob)
    batch = Batch(batch.trajectories, log_prob)
    unclipped = gradient("cispo", batch, objective="policy_gradient", trust_region="none")
    assert relative_error(gradient("cispo", batch), unclipped) < 1e-12


def test_reinforce_pp_baseline_with_equal_group_stds_is_proportional_to_grpo():
    reward = torch.tensor([1, 0, 0, 0, 3, 2, 2, 2.0]).double()
    t = Trajectories(group=torch.arange(8) // 4, mask=torch.ones(8, 3), reward=reward)
    batch = Batch(t, torch.zeros(8, 3))
    quotient = advantage("reinforce-pp-baseline", batch) / advantage("grpo", batch)
    torch.testing.assert_close(quotient, quotient[0, 0].expand_as(quotient))


def test_reinforce_pp_works_with_one_sample_per_prompt():
    t = Trajectories(
        group=torch.arange(4), mask=torch.ones(4, 2), reward=torch.tensor([1.0, 0, 0, 1])
    )
    found = advantage("reinforce-pp", Batch(t, None), reward=None)
    assert found[:, 0].tolist() == pytest.approx([1, -1, -1, 1])


def test_remax_of_the_greedy_answer_itself_is_zero():
    t = Trajectories(
        group=torch.zeros(2),
        mask=torch.ones(2, 3),
        reward=torch.tensor([1.7, 1.2]),
        baseline_reward=torch.tensor([1.2, 1.2]),
    )
    found = advantage("remax", Batch(t, None))
    assert found[0].tolist() == pytest.approx([0.5] * 3)
    assert found[1].tolist() == [0] * 3


def test_flow_grpo_and_dance_grpo_agree_on_one_group_up_to_the_kind_of_std():
    batch = even_batch(groups=1)
    flow = advantage("flow-grpo", batch, advantage={"ddof": 1, "eps": 1e-8})
    torch.testing.assert_close(flow, advantage("dance-grpo", batch))


def test_cps_differs_from_flow_grpo_in_the_sampler_and_the_kl_only():
    batch = make_batch()
    flow = gradient("flow-grpo", batch, regulariser=None)
    assert torch.equal(gradient("cps", batch), flow)
    kernels = {load_method(name).rollout.kernel for name in ("cps", "flow-grpo")}
    assert kernels == {"cps", "flow_sde"}


def test_gdpo_is_normalise_then_sum_then_whiten():
    rewards = {"a": torch.tensor([1.0, 0, 0, 2]), "b": torch.tensor([0.0, 5, 1, 1])}
    t = Trajectories(group=torch.tensor([0, 0, 1, 1]), mask=torch.ones(4, 1), rewards=rewards)
    batch = Batch(t, None)
    one = advantage("grpo", batch, reward={"combine": "gdpo"})
    other = advantage(
        "grpo",
        batch,
        reward={"combine": "normalise_then_sum"},
        advantage={"whiten": "samples", "unbiased": True},
    )
    torch.testing.assert_close(one, other)
