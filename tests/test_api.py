"""``mmgrpo.Trainer``: a script of a few lines trains text, vision and image models."""

import asyncio
import json

import numpy as np
import pytest
import torch
from fixtures_runs import MODALITIES, REWARDS, document, metrics_of, weight_bytes, write_models

import mmgrpo
from mmgrpo import build
from mmgrpo.api import infer_modality, place_options
from mmgrpo.config import load_config
from mmgrpo.errors import ConfigError, DataError, MethodError, MmgrpoError, ModelError, UsageError
from mmgrpo.policies.autoregressive import AutoregressivePolicy


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models") / "all")


ROLLOUTS = {
    "text": {"max_new_tokens": 4},
    "vision": {"max_new_tokens": 4},
    "image": {"num_steps": 3},
}


def characters(prompts, completions, answer, **columns):
    """TRL's signature: chat completions are messages."""
    assert len(prompts) == len(completions) == len(answer)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 11) for text in texts]


def redness(images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


REWARD = {"text": characters, "vision": characters, "image": redness}


def trainer(models, modality, run_dir, /, **options):
    folder = models / modality
    small = {"steps": 2, "learning_rate": 1e-3, "group_size": 4, "prompts_per_step": 2}
    arguments = {
        "policy": folder / "model", "reward": REWARD[modality], "data": folder / "train.jsonl",
        "method": "dr-grpo", "run_dir": str(run_dir), **small, **ROLLOUTS[modality], **options,
    }  # fmt: skip
    return mmgrpo.Trainer(**arguments)


def rows(models, modality):
    text = (models / modality / "train.jsonl").read_text()
    read = [json.loads(line) for line in text.splitlines()]
    for row in read:
        if "images" in row:
            row["images"] = [str(models / modality / name) for name in row["images"]]
    return read


@pytest.mark.parametrize("modality", MODALITIES)
def test_it_trains_from_rows_as_from_a_file(models, tmp_path, modality):
    from_file = trainer(models, modality, tmp_path / "a").train()
    from_rows = trainer(models, modality, tmp_path / "b", data=rows(models, modality)).train()
    assert from_file["step"] == from_rows["step"] == 2
    assert from_file["grad_norm"] > 0
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")


def test_it_is_the_command_lines_run(models, tmp_path):
    spread = f"{REWARDS}:spread"
    trainer(models, "text", tmp_path / "api", reward=spread, method="dr-grpo", seed=4).train()
    doc = document(
        models, "text", tmp_path / "cli", seed=4, trainer={"steps": 2},
        rollout={"max_new_tokens": 4, "stop": [], "prompts_per_step": 2},
    )  # fmt: skip
    build.train(load_config(doc))
    assert metrics_of(tmp_path / "api") == metrics_of(tmp_path / "cli")
    assert weight_bytes(tmp_path / "api") == weight_bytes(tmp_path / "cli")


def test_it_resumes_and_returns_the_metrics_again(models, tmp_path):
    first = trainer(models, "text", tmp_path / "run").train()
    again = trainer(models, "text", tmp_path / "run").train()
    assert again["reward/mean"] == first["reward/mean"]
    more = trainer(models, "text", tmp_path / "run", steps=3).train()
    assert more["step"] == 3


def test_options_reach_their_sections(models, tmp_path):
    made = trainer(
        models, "text", tmp_path, method={"id": "grpo", "advantage": {"scale": "none"}},
        temperature=0.5, minibatches=2, lora={"rank": 2}, eval={"every": 7, "samples": 1},
        seed=9, system_prompt="Be brief.", eval_data=rows(models, "text")[:2], ema_decay=0.9,
        rollout={"top_k": 5}, trackers=[], reward_failure="drop",
    )  # fmt: skip
    config = made.config
    assert config.method.overrides == {"advantage": {"scale": "none"}}
    assert made.parts.method.advantage.scale == "none"
    assert (config.rollout.temperature, config.rollout.top_k, config.rollout.group_size) == (
        0.5,
        5,
        4,
    )
    assert (config.trainer.minibatches, config.trainer.ema_decay) == (2, 0.9)
    assert config.model.lora.rank == 2
    assert (config.eval.every, config.seed, config.reward_failure) == (7, 9, "drop")
    assert config.data.system_prompt == "Be brief."
    assert len(made.parts.evaluator.prompts) == 2
    assert not (tmp_path / "config.yaml").exists()  # nothing is written before train()


def test_steps_and_learning_rate_have_defaults(models, tmp_path):
    made = mmgrpo.Trainer(
        models / "text" / "model", characters, rows(models, "text"), max_new_tokens=2,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert (made.config.trainer.steps, made.config.trainer.learning_rate) == (100, 1e-6)
    assert made.config.method.id == "grpo"


class Judge:
    """An object that can be called, with a name of its own."""

    def __call__(self, completions, **columns):
        return [0.5 for _ in completions]


async def slow(completions, **columns):
    await asyncio.sleep(0)
    return [None if len(c) % 2 else 1.0 for c in completions]


def test_several_rewards_of_every_kind(models, tmp_path):
    rewards = [
        characters,
        {"name": Judge(), "weight": 0.5},
        slow,
        "exact_answer",
        {"name": "tag_format", "weight": 0.1},
        lambda completions, **columns: [float(len(c)) for c in completions],
    ]
    made = trainer(models, "text", tmp_path / "run", reward=rewards, method="grpo")
    metrics = made.train()
    names = ["characters", "Judge", "slow", "exact_answer", "tag_format", "<lambda>"]
    assert list(made.parts.scorer.weights.items()) == list(
        zip(names, [1, 0.5, 1, 1, 0.1, 1], strict=True)
    )
    assert {f"reward/{name}" for name in names} <= metrics.keys()
    assert metrics["reward/Judge"] == 0.5


def test_a_policy_object_is_used_as_it_is(models, tmp_path):
    policy = AutoregressivePolicy(models / "text" / "model", reference="none")
    before = {n: p.detach().clone() for n, p in policy.network.named_parameters()}
    made = trainer(models, "text", tmp_path / "run", policy=policy)
    assert made.parts.policy is policy
    assert made.config.model.path == "<in memory>"
    made.train()
    assert any(not torch.equal(p, before[n]) for n, p in policy.network.named_parameters())
    with pytest.raises(MethodError, match="held to a reference and the policy has none"):
        trainer(models, "text", tmp_path / "other", policy=policy, method="grpo")


def test_a_judge_and_held_out_prompts(models, tmp_path):
    metrics = trainer(
        models, "text", tmp_path / "run", eval_data=models / "text" / "eval.jsonl",
        eval={"judge": f"{REWARDS}:spread", "every": 1},
    ).train()  # fmt: skip
    assert metrics["eval/success"] == metrics["eval/spread"]
    assert "eval/characters" in metrics


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"learning_rat": 1e-3}, ConfigError, ["unknown option 'learning_rat'", "learning_rate"]),
        ({"rewards": characters}, ConfigError, ["'rewards'", "did you mean 'reward'"]),
        ({"groupsize": 3}, ConfigError, ["'groupsize'", "did you mean 'group_size'"]),
        ({"method": "dappo"}, UsageError, ["dappo", "did you mean 'dapo'"]),
        ({"method": "flow-grpo"}, UsageError, ["flow-grpo", "text"]),
        ({"steps": "many"}, ConfigError, ["steps"]),
        ({"eval": {"evry": 3}}, ConfigError, ["evry", "every"]),
        ({"modality": "txt"}, ConfigError, ["txt", "did you mean 'text'"]),
        ({"policy": "no/such/folder/at/all"}, ModelError, ["no/such/folder"]),
        ({"reward": "exact_answr"}, ConfigError, ["exact_answr", "exact_answer"]),
        ({"reward": redness}, ConfigError, ["redness", "images"]),
        ({"reward": []}, ConfigError, ["rewards"]),
        ({"data": "nowhere.jsonl"}, DataError, ["nowhere.jsonl"]),
        ({"data": []}, DataError, []),
        ({"data": [{"promt": "x"}]}, DataError, ["promt"]),
        ({"data": [{"prompt": "x"}] * 3}, UsageError, ["answer"]),
        ({"prompts_per_step": 50}, DataError, ["12 rows", "50 different prompts"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_written(models, tmp_path, options, error, parts):
    with pytest.raises(error) as caught:
        trainer(models, "text", tmp_path / "run", **options)
    assert isinstance(caught.value, MmgrpoError)
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused_at_once(models, tmp_path):
    trainer(models, "text", tmp_path / "run").train()
    with pytest.raises(ConfigError, match="holds another run: seed"):
        trainer(models, "text", tmp_path / "run", seed=1)


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_modality_is_seen_in_the_folder(models, modality):
    assert infer_modality(models / modality / "model") == modality


@pytest.mark.parametrize(
    ("modality", "option", "home"),
    [
        ("text", "temperature", "rollout"),
        ("text", "prompts", "eval"),
        ("image", "num_steps", "rollout"),
        ("image", "guidance_scale", "rollout"),
        ("vision", "train_vision", "model"),
        ("vision", "image_column", "data"),
        ("text", "trackers", "tracking"),
    ],
)
def test_an_option_of_two_sections_goes_to_the_training(modality, option, home):
    document = {"modality": modality}
    place_options(document, {option: 1})
    assert document == {"modality": modality, home: {option: 1}}
    place_options(document, {"seed": 3})
    assert document["seed"] == 3
