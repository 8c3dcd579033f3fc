"""One step: on-policy ratios, greedy baselines, dynamic sampling, what is counted and shown."""

import dataclasses
import json
import warnings

import pytest
import torch
from fixtures_runs import MODALITIES, REWARDS, document, metrics_of

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.core.seeding import mix_seed
from mmgrpo.trainer.loop import check_on_policy
from mmgrpo.trainer.metrics import Report
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import collect, credit, train_step


def assemble(models, modality, tmp_path, **changes):
    config = load_config(document(models, modality, tmp_path / "run", **changes))
    return build.assemble(config), config


# -- on-policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_ratio_is_1_before_an_update(models, tmp_path, modality, lora):
    changes = {"model": {"lora": lora}, "trainer": {"learning_rate": 1e-2, "micro_batch_size": 3}}
    if modality != "image":
        changes["rollout"] = {"temperature": 0.7}
    parts, config = assemble(models, modality, tmp_path, **changes)
    state = State()
    for _ in range(3):  # before the first update of every rollout
        train_step(parts, state, config)
        assert state.metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert state.metrics["ratio/first_max_deviation"] < 1e-4
        assert state.metrics["clip_fraction"] == 0


def test_only_the_first_minibatch_is_on_policy(models, tmp_path):
    changes = {"trainer": {"minibatches": 4, "learning_rate": 1e-2}}
    parts, config = assemble(models, "text", tmp_path, **changes)
    state = State()
    train_step(parts, state, config)
    assert state.metrics["ratio/first_max_deviation"] < 1e-4
    assert abs(state.metrics["ratio/mean"] - 1) > 1e-4
    assert state.updates == 4


def test_a_temperature_that_differs_is_noticed(models, tmp_path, monkeypatch):
    config = load_config(document(models, "text", tmp_path / "run", trainer={"steps": 2}))
    parts = build.assemble(config)
    generate = parts.engine.generate

    def colder(*arguments, **options):
        rollout = generate(*arguments, **options)
        payload = rollout.trajectories.payload
        payload = dataclasses.replace(payload, temperature=payload.temperature * 0.8)
        return dataclasses.replace(
            rollout, trajectories=rollout.trajectories.replace(payload=payload)
        )

    monkeypatch.setattr(parts.engine, "generate", colder)
    with pytest.warns(UserWarning, match="ratio deviates from 1 by .*temperature") as caught:
        build.run(parts, config)
    assert len([w for w in caught if "ratio deviates" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("dtype", "deviation", "warned"),
    [("float32", 5e-4, False), ("float32", 5e-3, True), ("bfloat16", 0.1, False),
     ("bfloat16", 0.5, True), ("float16", 0.01, False), ("float16", 0.1, True)],
)  # fmt: skip
def test_the_tolerance_depends_on_the_dtype(dtype, deviation, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_on_policy({"ratio/first_max_deviation": deviation}, dtype)
    assert bool(caught) == warned


@pytest.mark.parametrize("modality", MODALITIES)
def test_bfloat16_stays_within_its_tolerance(models, tmp_path, modality):
    config = load_config(
        document(
            models, modality, tmp_path / "run", model={"dtype": "bfloat16"}, trainer={"steps": 1}
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build.train(config)


# -- greedy baseline ----------------------------------------------------------------------------


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_baseline_is_the_reward_of_the_greedy_sample(models, tmp_path, modality):
    parts, config = assemble(models, modality, tmp_path, method="remax")
    report = Report()
    collected = collect(parts, State(), config, report)
    trajectories = collected.trajectories
    prompts = {sample.prompt.index: sample.prompt for sample in collected.samples}
    (name,), seed = trajectories.rewards, mix_seed(config.seed, 0)
    for group in trajectories.group.unique():
        rows = trajectories.group == group
        owner = collected.samples[int(rows.nonzero()[0])].prompt.index
        greedy = parts.greedy_engine.generate([prompts[owner]], group_size=1, seed=seed)
        expected = parts.scorer.score(greedy.samples, step=0).values[name]
        assert torch.allclose(trajectories.baseline_reward[rows], expected, atol=1.1e-3)
    assert trajectories.baseline_reward.std() > 0
    credited = credit(parts, trajectories, config, report)
    advantage = trajectories.rewards[name] - trajectories.baseline_reward
    expected = advantage[:, None].expand_as(credited.mask)[credited.mask]
    torch.testing.assert_close(credited.advantage[credited.mask], expected)
    assert report.sums["count/reward_calls"] == 16 + 4


# -- dynamic sampling ---------------------------------------------------------------------------


def test_groups_without_spread_are_replaced(models, tmp_path):
    changes = {"rewards": [f"{REWARDS}:rarely"], "rollout": {"group_size": 4}}
    parts, config = assemble(models, "text", tmp_path, method="dapo", **changes)
    report, state = Report(), State()
    collected = collect(parts, state, config, report)
    assert 1 < state.draws <= parts.method.sampler.max_rounds
    group = collected.trajectories.group
    assert torch.equal(group, group.sort().values)
    assert group.unique(return_counts=True)[1].tolist() == [4] * 4
    assert len(collected.samples) == 16
    assert report.sums["count/reward_calls"] == 16 * state.draws
    plain, config = assemble(models, "text", tmp_path, method="dr-grpo", **changes)
    first = collect(plain, State(), config, Report())

    def with_spread(trajectories):
        score = parts.method.score(trajectories)
        return sum(
            float(score[trajectories.group == g].std()) > 0 for g in trajectories.group.unique()
        )

    assert with_spread(collected.trajectories) > with_spread(first.trajectories)


def test_a_prompt_that_is_drawn_twice_in_a_step_makes_two_groups(models, tmp_path):
    """Twelve rows, all of them in every round."""
    changes = {
        "rewards": [f"{REWARDS}:rarely"],
        "rollout": {"prompts_per_step": 12, "group_size": 2},
    }
    parts, config = assemble(models, "text", tmp_path, method="dapo", **changes)
    state = State()
    collected = collect(parts, state, config, Report())
    assert state.draws == 3
    assert collected.trajectories.group.unique(return_counts=True)[1].tolist() == [2] * 12
    prompts = [sample.prompt.index for sample in collected.samples]
    assert len(set(prompts)) < 12


def test_a_group_is_one_prompt(models, tmp_path):
    parts, config = assemble(models, "vision", tmp_path)
    state = State(draws=3)
    collected = collect(parts, state, config, Report())
    assert collected.trajectories.group.tolist() == [12 + n // 4 for n in range(16)]
    owners = [sample.prompt.index for sample in collected.samples]
    assert all(len(set(owners[n : n + 4])) == 1 for n in range(0, 16, 4))


# -- the report ---------------------------------------------------------------------------------


CONTRACT = {
    "step", "reward/mean", "loss", "kl", "ratio/mean", "clip_fraction", "grad_norm", "entropy",
    "groups/uniform_fraction", "time/rollout_s", "time/reward_s", "time/update_s",
    "count/generated_decisions", "count/forward", "count/backward",
}  # fmt: skip


@pytest.mark.parametrize("modality", MODALITIES)
def test_metrics_and_samples(models, tmp_path, modality):
    doc = document(
        models, modality, tmp_path / "run", method="grpo",
        trainer={"steps": 3, "micro_batch_size": 8}, eval={"every": 2},
    )  # fmt: skip
    doc["data"]["eval"] = doc["data"]["train"].replace("train.jsonl", "eval.jsonl")
    last = build.train(load_config(doc))
    rows = metrics_of(tmp_path / "run", without=("nothing",))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [("eval/success" in row) for row in rows] == [True, False, True, True]
    name = "brightness" if modality == "image" else "spread"
    for row in rows[1:]:
        assert row.keys() >= CONTRACT | {f"reward/{name}"}
        assert row["reward/mean"] == row[f"reward/{name}"]
        assert row["count/backward"] == 2
        assert row["grad_norm"] > 0
    assert last["step"] == 3
    assert last["reward/mean"] == rows[3]["reward/mean"]
    names = {path.name for path in (tmp_path / "run" / "samples").iterdir()}
    suffix = "png" if modality == "image" else "md"
    for step in (1, 2, 3):
        assert f"step_{step:06d}.{suffix}" in names
    for step in (0, 2, 3):
        assert f"step_{step:06d}_eval.{suffix}" in names
    samples = (tmp_path / "run/samples/step_000001.jsonl").read_text().splitlines()
    assert any(abs(json.loads(line)["advantage"]) > 0 for line in samples)


def test_nothing_to_learn_is_reported_as_such(models, tmp_path):
    """All completions earn the same: DAPO drops every group."""
    penalty = {"name": "length_penalty", "max_length": 100, "buffer": 10}
    doc = document(models, "text", tmp_path / "run", method="dapo", trainer={"steps": 1})
    metrics = build.train(load_config({**doc, "rewards": [penalty]}))
    assert metrics["groups/uniform_fraction"] == 1
    assert metrics["count/reward_calls"] == 3 * 16
    assert (metrics["grad_norm"], metrics["loss"], metrics["ratio/mean"]) == (0, 0, 1)
