"""The next-scale engine: streams, temperatures, frequencies, and what it reports."""

import pytest
import torch
from fixtures_scales import PROMPTS, tiny_scales

from mmgrpo.errors import ConfigError
from mmgrpo.policies.image_scales import ImageScalesPolicy
from mmgrpo.rollout.image_scales import ImageScalesEngine


@pytest.fixture(scope="module")
def policy():
    return ImageScalesPolicy(tiny_scales())


def codes_of(rollout):
    return rollout.trajectories.payload.completion_ids


def test_a_rollout_is_complete(policy):
    rollout = ImageScalesEngine(policy).generate(PROMPTS, group_size=2, seed=0, version=7)
    trajectories = rollout.trajectories
    assert trajectories.group.tolist() == [3, 3, 8, 8]
    assert trajectories.version.tolist() == [7] * 4
    assert trajectories.segment.tolist() == [[0, 1, 1, 2, 2, 2, 2, 2, 2]] * 4
    assert bool(trajectories.mask.all())
    assert rollout.cost.forwards == 3
    assert rollout.cost.decisions == 36
    assert [sample.prompt.index for sample in rollout.samples] == [3, 3, 8, 8]
    assert rollout.samples[0].image.size == (6, 4)
    assert rollout.samples[0].length == 9


def test_a_sample_depends_on_its_own_name_only(policy):
    engine = ImageScalesEngine(policy)
    whole = codes_of(engine.generate(PROMPTS, group_size=3, seed=1))
    alone = codes_of(engine.generate(PROMPTS[1:], group_size=5, seed=1))
    assert torch.equal(whole[3:], alone[:3])
    assert not torch.equal(whole, codes_of(engine.generate(PROMPTS, group_size=3, seed=2)))
    assert torch.equal(whole, codes_of(engine.generate(PROMPTS, group_size=3, seed=1)))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_codes_are_drawn_as_often_as_they_should(policy, temperature):
    """Given the codes before it, against the softmax of a plain call."""
    engine = ImageScalesEngine(policy, temperature=temperature)
    drawn = codes_of(engine.generate(PROMPTS[:1], group_size=4000, seed=5))
    prompts, row = policy.encode(PROMPTS[:1]), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        first = policy.logits(prompts, row, drawn[:1, :0])[0, 0]
        common = drawn[:, 0].mode().values
        second = policy.logits(prompts, row, common.view(1, 1))[0, 1:]
    follows = drawn[drawn[:, 0] == common][:, 1:3]
    for codes, logits in ((drawn[:, 0], first), (follows[:, 0], second[0]), (follows[:, 1], second[1])):  # fmt: skip  # noqa: E501
        wanted = (logits / temperature).softmax(-1)
        found = torch.bincount(codes, minlength=5) / len(codes)
        error = (wanted * (1 - wanted) / len(codes)).sqrt()
        assert bool(((found - wanted).abs() < 4.5 * error + 1e-4).all())
    pairs = torch.zeros(5, 5).index_put_(tuple(follows.T), torch.tensor(1.0), accumulate=True)
    joint = pairs / len(follows)
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    assert (joint - independent).abs().max() < 4 / len(follows) ** 0.5


def test_greedy_takes_the_likeliest_code(policy):
    rollout = ImageScalesEngine(policy, temperature=0.0).generate(PROMPTS, group_size=2, seed=0)
    codes, payload = codes_of(rollout), rollout.trajectories.payload
    assert torch.equal(codes[0], codes[1])
    with torch.no_grad():
        logits = policy.logits(payload.prompts, payload.prompt_row, codes)
    assert torch.equal(codes, logits.argmax(-1))
    torch.testing.assert_close(
        policy.evaluate(rollout.trajectories).log_prob,
        rollout.trajectories.old_log_prob,
        rtol=0,
        atol=1e-5,
    )


def test_a_negative_temperature_is_refused(policy):
    with pytest.raises(ConfigError, match="at least 0; got -1"):
        ImageScalesEngine(policy, temperature=-1.0)
