"""``speed.overlap_rewards`` in whole steps: rewards run beside the rollout, and nothing else."""

import threading

import pytest
from fixtures_runs import document

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.errors import RewardError
from mmgrpo.trainer.metrics import Report
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import collect, train_step

CASES = [("image", "dr-grpo"), ("image", "g2rpo"), ("text", "dr-grpo"), ("text", "remax")]


def steps(models, modality, method, folder, overlap):
    changes = {"speed": {"overlap_rewards": overlap}, "method": method}
    if modality == "image":
        changes["rollout"] = {"num_steps": 6}
    config = load_config(document(models, modality, folder, **changes))
    parts, state, found = build.assemble(config), State(), []
    for _ in range(2):
        train_step(parts, state, config)
        found.append({k: v for k, v in state.metrics.items() if not k.startswith("time/")})
    return found


@pytest.mark.parametrize(("modality", "method"), CASES)
def test_a_run_is_the_same_with_and_without(models, tmp_path, modality, method):
    beside, after = (
        steps(models, modality, method, tmp_path / str(overlap), overlap)
        for overlap in (True, False)
    )
    for one, other in zip(beside, after, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6, nan_ok=True)


def watched_parts(models, folder, reward, **changes):
    """The parts of an image run with a reward of the test's own."""
    from mmgrpo.scoring import load_rewards

    config = load_config(
        document(models, "image", folder, **{"speed": {"overlap_rewards": True}, **changes})
    )
    return build.assemble(config, rewards=load_rewards([reward])), config


def test_the_first_group_is_scored_before_the_last_is_decoded(models, tmp_path, monkeypatch):
    """The decoder waits before the last group until the reward has begun."""
    begun, calls, decoded = threading.Event(), [], []

    def reward(images):
        begun.set()
        calls.append(len(images))
        return [float(place) for place, _ in enumerate(images)]

    parts, config = watched_parts(models, tmp_path, reward)
    plain = parts.policy.family.decode

    def decode(latents):
        decoded.append(len(latents))
        if len(decoded) == config.rollout.prompts_per_step:
            assert begun.wait(20)
        return plain(latents)

    monkeypatch.setattr(parts.policy.family, "decode", decode)
    found = collect(parts, State(), config, Report())
    assert decoded == calls == [4] * 4
    assert found.trajectories.rewards["reward"].tolist() == [0.0, 1.0, 2.0, 3.0] * 4


@pytest.mark.parametrize("wanted", [False, "async"])
def test_switched_off_a_reward_is_called_once_after_the_rollout(models, tmp_path, wanted):
    calls = []

    def reward(images):
        calls.append((len(images), threading.current_thread()))
        return [0.5] * len(images)

    parts, config = watched_parts(models, tmp_path, reward, speed={"overlap_rewards": wanted})
    collect(parts, State(), config, Report())
    assert calls == [(16, threading.main_thread())]


def test_by_default_an_async_reward_begins_with_the_first_group(models, tmp_path):
    calls = []

    async def reward(images):
        calls.append(len(images))
        return [float(place) for place, _ in enumerate(images)]

    parts, config = watched_parts(models, tmp_path, reward, speed={})
    assert config.speed.overlap_rewards == "async"
    collect(parts, State(), config, Report())
    assert calls == [4] * 4


def test_a_reward_that_fails_on_one_group_stops_the_step(models, tmp_path):
    calls = []

    def reward(images):
        calls.append(len(images))
        if len(calls) == 2 or len(images) != 4:
            raise OSError("the judge's server is down")
        return [1.0] * len(images)

    parts, config = watched_parts(models, tmp_path, reward)
    state = State()
    with pytest.raises(RewardError, match="the judge's server is down"):
        collect(parts, state, config, Report())
    assert calls[:3] == [4, 4, 16]
