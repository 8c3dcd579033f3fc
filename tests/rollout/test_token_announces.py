"""Groups of completions that are announced when their last row ends, while others go on."""

import pytest
import torch
from fixtures_tokens import tiny_text
from test_autoregressive_engine import eager_to_end

from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.autoregressive import AutoregressiveEngine

PROMPTS = [Prompt(5, "1+1="), Prompt(2, "12+30="), Prompt(9, "7")]
GROUP, ROOM = 3, 30
ROWS = [{}, {"max_rows": 4}, {"max_rows": 1}]


@pytest.fixture(scope="module")
def policy():
    return eager_to_end(AutoregressivePolicy(tiny_text()))


def generate(policy, on_samples=None, **options):
    engine = AutoregressiveEngine(policy, max_new_tokens=ROOM, **options)
    return engine.generate(PROMPTS, group_size=GROUP, seed=9, on_samples=on_samples)


def written(sample):
    return sample.prompt.index, sample.completion, sample.truncated, sample.length


@pytest.mark.parametrize("options", ROWS)
def test_announcing_changes_no_sample_and_no_decision(policy, options):
    groups = []
    plain, told = generate(policy, **options), generate(policy, groups.append, **options)
    assert [written(s) for s in told.samples] == [written(s) for s in plain.samples]
    assert torch.equal(told.trajectories.old_log_prob, plain.trajectories.old_log_prob)
    assert torch.equal(told.trajectories.mask, plain.trajectories.mask)
    ended = [group[0].prompt.index for group in groups]
    assert sorted(ended) == [2, 5, 9]
    assert ended != [5, 2, 9] or options == {"max_rows": 1}, "the case shows nothing: all in order"
    assert all([s.prompt.index for s in group] == [group[0].prompt.index] * 3 for group in groups)
    named = {group[0].prompt.index: group for group in groups}
    announced = [sample for prompt in PROMPTS for sample in named[prompt.index]]
    assert all(one is other for one, other in zip(announced, told.samples, strict=True))


def test_a_group_is_announced_with_its_last_token_and_before_longer_ones(policy):
    """Counts the network's calls: a group waits for its own rows only."""
    calls = []
    start = policy.forwards
    rollout = generate(policy, lambda group: calls.append((group, policy.forwards - start)))
    longest = {group[0].prompt.index: max(s.length for s in group) for group, _ in calls}
    assert len(set(longest.values())) > 1, "the case shows nothing: all groups are equally long"
    assert [longest[group[0].prompt.index] for group, _ in calls] == sorted(longest.values())
    assert [count for _, count in calls] == [longest[group[0].prompt.index] for group, _ in calls]
    assert rollout.cost.forwards == max(longest.values())
