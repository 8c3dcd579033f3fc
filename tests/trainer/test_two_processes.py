"""Two gloo processes, as torchrun and accelerate start them, train what one process trains."""

import json
import socket
import sys

import pytest
import torch
from accelerate.utils import DistributedType
from fixtures_masked import masked_document, write_masked
from fixtures_runs import REWARDS, command, document, finish, merged, metrics_of, write_config
from fixtures_scales import scales_document, write_scales
from safetensors.torch import load_file
from train_all import train_all

from mmgrpo.build import train
from mmgrpo.config import list_presets, load_config
from mmgrpo.errors import ConfigError
from mmgrpo.methods import load_method
from mmgrpo.trainer import distributed

CPU = {"ACCELERATE_USE_CPU": "true"}
OWN = ("time/", "count/forward", "count/backward")
"""What each process has for itself: seconds, and calls of its own network."""

RAGGED = {"rewards": [f"{REWARDS}:broken_for_some"], "reward_failure": "drop"}
SPARSE = {"rewards": [f"{REWARDS}:rarely"], "rollout": {"group_size": 2}}
MINI = {"trainer": {"minibatches": 3, "micro_batch_size": 2}}
REASONED = {
    "method": {
        "id": "reasongen-r1",
        "regulariser": {"entropy_control": {"targets": [3.0, 2.0], "learning_rate": 0.01}},
    },
    "model": {"plan_tokens": 3},
    "trainer": {"minibatches": 2, "micro_batch_size": 3},
}
SEVERAL = {"trainer": {"minibatches": 2, "epochs": 2, "micro_batch_size": 3}}
DDPO = {"id": "ddpo", "advantage": {"history_size": 6, "history_min": 4}}
EMA = {"trainer": {"ema_decay": 0.9}, "eval": {"every": 2}}


def torchrun(*arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    return command(*arguments, environment=CPU, launcher=launcher)


def preset_cases(modality):
    """Every preset of the modality, by name."""
    fits = [name for name in list_presets() if modality in load_method(name).modalities]
    return {f"{modality}-{name}": (modality, {"method": name}) for name in fits}


QUICK = {
    "kl-reference": ("text", {"method": "grpo", "trainer": {"micro_batch_size": 3}}),
    "several-updates": ("text", {"method": "gspo", **SEVERAL}),
    "three-minibatches": ("text", {"method": "cispo", **MINI}),
    "ragged-groups": ("text", {"method": "reinforce-pp-baseline", **RAGGED}),
    "dynamic-sampling": ("text", {"method": "dapo", **SPARSE, "trainer": {"micro_batch_size": 2}}),
    "minibatches-of-few": ("text", {"method": "dapo", **SPARSE, "trainer": {"minibatches": 4}}),
    "valid-groups": ("text", {"method": "gpg", **SPARSE}),
    "greedy": ("text", {"method": "remax", **RAGGED}),
    "eval-and-average": ("text", EMA),
    "lora": ("text", {"method": "rloo", "model": {"lora": {"rank": 2}}}),
    "vision": ("vision", {"method": "grpo", "trainer": {"micro_batch_size": 5}}),
    "vision-tower": ("vision", {"model": {"train_vision": True}, "rollout": {"max_new_tokens": 2}}),
    "image": ("image", {"method": "flow-grpo", "trainer": {"micro_batch_size": 3}}),
    "image-history": ("image", {"method": DDPO, "trainer": {"micro_batch_size": 3}}),
    "image-tokens": ("image_tokens", REASONED),
    "image-scales": ("image_scales", {"trainer": {"micro_batch_size": 3}}),
    "masked-path": ("masked_text", {"trainer": {"micro_batch_size": 3}}),
    "masked-elbo": ("masked_text", {"method": "vrpo-llada", "trainer": {"micro_batch_size": 4}}),
    "masked-sites": ("masked_text", {"method": "sepo", "trainer": {"minibatches": 2}}),
    "image-dropped": ("image", {"method": "dance-grpo", "model": {"lora": {"rank": 2}}}),
}  # fmt: skip


def scales(models, modality, run_dir, **changes):
    return scales_document(models / modality, run_dir, **changes)


def masked(models, modality, run_dir, **changes):
    return masked_document(models / modality, run_dir, **changes)


DOCUMENTS = {"image_scales": scales, "masked_text": masked}
"""Modalities whose configurations are written by fixtures of their own."""


@pytest.fixture(scope="session")
def folders(models):
    write_scales(models / "image_scales")
    write_masked(models / "masked_text")
    return models


def documents(models, cases, folder):
    made = []
    for name, (modality, changes) in cases.items():
        doc = DOCUMENTS.get(modality, document)(models, modality, folder / name, **changes)
        doc["trainer"]["steps"] = 2
        if "eval" in changes:
            doc["data"]["eval"] = doc["data"]["train"].replace("train.jsonl", "eval.jsonl")
        made.append(doc)
    return made


def train_both(models, cases, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "documents.json"
        file.write_text(json.dumps(documents(models, cases, tmp_path / folder)))
    script = str(sys.modules[train_all.__module__].__file__)
    both = torchrun(script, tmp_path / "two" / "documents.json")
    train_all(tmp_path / "one" / "documents.json")
    code, out, err = finish(both, timeout=600)
    assert code == 0, out + err


def compare(one, two):
    for first, second in zip(
        metrics_of(one, without=OWN), metrics_of(two, without=OWN), strict=True
    ):
        assert first.keys() == second.keys()
        for name, value in first.items():
            expected = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
            assert second[name] == expected, (name, first["step"])
    a, b = (load_file(run / "checkpoints/step_000002/state.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    names = [name for name in a if name.startswith(("optimizer/weight/", "ema/"))]
    flat_a, flat_b = (torch.cat([t[n].double().flatten() for n in names]) for t in (a, b))
    assert float((flat_a - flat_b).norm() / flat_a.norm()) < 1e-5
    return flat_a


def test_two_processes_train_what_one_trains(folders, tmp_path):
    train_both(folders, QUICK, tmp_path)
    for case in QUICK:
        compare(tmp_path / "one" / case, tmp_path / "two" / case)
    rows = {case: metrics_of(tmp_path / "two" / case) for case in QUICK}
    assert any(row["count/dropped_samples"] for row in rows["ragged-groups"])
    assert any(row["count/reward_calls"] > 8 for row in rows["dynamic-sampling"])
    assert ["eval/success" in row for row in rows["eval-and-average"]] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "vision", "image", "image_tokens", *DOCUMENTS])
def test_every_preset(folders, tmp_path, modality):
    cases = preset_cases(modality)
    train_both(folders, cases, tmp_path)
    for case in cases:
        compare(tmp_path / "one" / case, tmp_path / "two" / case)


def test_prompts_that_do_not_divide_are_refused_before_anything_is_written(models, tmp_path):
    doc = document(models, "text", tmp_path / "run", rollout={"prompts_per_step": 3})
    config = write_config(tmp_path / "run.yaml", doc)
    code, _, err = finish(torchrun("-m", "mmgrpo", "train", config))
    assert code != 0
    assert "rollout.prompts_per_step is 3 and does not divide among 2 processes" in err
    assert not (tmp_path / "run").exists()


def test_accelerate_launch_with_settings_of_its_own(models, tmp_path):
    """Its accumulation and precision must not scale or round our gradients."""
    doc = document(models, "text", tmp_path / "run", trainer={"steps": 1})
    config = write_config(tmp_path / "run.yaml", doc)
    launcher = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=2")
    options = ("--mixed_precision=bf16", "-m", "mmgrpo", "train", config)
    accumulation = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    process = command(*options, launcher=launcher, environment=accumulation)
    train(load_config(merged(doc, {"run_dir": str(tmp_path / "plain")})))
    code, out, err = finish(process)
    assert code == 0, out + err
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "SHARDED", (DistributedType.NO,))
    with pytest.raises(ConfigError, match="asks for NO, and weights cannot be sharded"):
        distributed.make_accelerator()
