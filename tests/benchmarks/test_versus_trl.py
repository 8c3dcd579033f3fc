"""The comparison's own half: what it measures of this package, without the package it is beside."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import systems
import versus_trl
from systems import KINDS, Mmgrpo, save_model
from versus_trl import (
    CASES,
    GROUP,
    MEMORY,
    NEEDED_GIB,
    Case,
    fixed_batch,
    gradient_error,
    refusal,
    row,
    running,
)

SMALL = [
    Case(5, 4, 300),
    Case(5, 4, 300, kind="Qwen2-VL"),
]


def plain_gradient(folder, case, batch):
    """GRPO's gradient by the model's own forward, one row at a time: mean over rows of the mean
    over tokens of -A log p, for the ratio is 1."""
    system = Mmgrpo(folder, case, batch)
    model, encode = system.policy.model, system.policy.processing
    model.zero_grad()
    rows = zip(batch["completions"], batch["advantages"], strict=True)
    for number, (completion, advantage) in enumerate(rows):
        prompt = batch["prompts"][number // GROUP]
        if prompt.images:
            text = encode.apply_chat_template(
                prompt.content, add_generation_prompt=True, tokenize=False
            )
            inputs = dict(encode(text=[text], images=list(prompt.images), return_tensors="pt"))
        else:
            inputs = dict(encode([prompt.content], return_tensors="pt"))
        start = inputs.pop("input_ids")
        inputs.pop("attention_mask"), inputs.pop("token_type_ids", None)
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([kinds, 0 * completion[None]], dim=1)
        ids = torch.cat([start, completion[None]], dim=1)
        log_p = model(input_ids=ids, **inputs).logits[0, start.shape[1] - 1 : -1].log_softmax(-1)
        chosen = log_p.gather(1, completion[:, None])
        (-advantage * chosen.mean() / len(batch["completions"])).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.kind)
def test_the_gradient_that_is_compared_is_the_plain_one(case, tmp_path):
    save_model(tmp_path, vocabulary=case.vocabulary, size=case.size, kind=case.kind)
    batch = fixed_batch(case)
    found = Mmgrpo(tmp_path, case, batch).gradient()
    expected = plain_gradient(tmp_path, case, batch)
    assert found.keys() == expected.keys()
    assert any("visual" in name for name in found) == (case.kind == "Qwen2-VL")
    assert all(bool(value.any()) for value in found.values() if value.dim() > 1)
    assert versus_trl.gradient_error(found, expected) < versus_trl.TOLERANCE


def test_only_the_compared_gradient_admits_image_placeholders(tmp_path):
    case = SMALL[1]
    save_model(tmp_path, vocabulary=case.vocabulary, size=case.size, kind=case.kind)
    system = Mmgrpo(tmp_path, case, fixed_batch(case))
    compared = system.gradient()
    assert len(system.policy.forbidden) == 2
    system.update()
    trained = {n: p.grad for n, p in system.policy.model.named_parameters()}
    assert versus_trl.gradient_error(trained, compared) > versus_trl.TOLERANCE


def test_completions_have_full_length(tmp_path):
    case = SMALL[1]
    save_model(tmp_path, vocabulary=case.vocabulary, size=case.size, kind=case.kind)
    system = Mmgrpo(tmp_path, case, fixed_batch(case))
    found = system.engine.generate(system.prompts, group_size=GROUP, seed=0)
    assert found.trajectories.mask.shape == (2 * GROUP, case.completion)
    assert bool(found.trajectories.mask.all())


def test_every_prompt_has_an_image_of_its_own():
    prompts = fixed_batch(CASES[-1])["prompts"]
    assert [image.size for prompt in prompts for image in prompt.images] == [(224, 224)] * 2
    first, second = (prompt.images[0].tobytes() for prompt in prompts)
    assert first != second


def test_a_row_shows_seconds_and_ratios_and_what_was_left_out():
    parts = {
        "TRL best settings": {"step": 3.0, "update": 2.0, "generate": 1.0},
        "mmgrpo": {"step": 1.0, "update": 1.0, "generate": 0.5},
    }
    text = row(CASES[0], {"seconds": parts, "error": 1e-7}, dict.fromkeys(systems.SYSTEMS))
    assert "- / 3.000 / 1.000 | **3.0x**" in text
    assert text.count("**2.0x**") == 2
    assert row(CASES[0], None, {}).count("not measured") == 8
    assert text.count("|") == row(CASES[0], None, {}).count("|") == versus_trl.HEADER.count("|") / 2


def test_a_peak_that_does_not_fit_is_refused_in_a_sentence(monkeypatch, capsys):
    free = int(3.5 * 2**30)
    monkeypatch.setattr(
        versus_trl.psutil, "virtual_memory", lambda: SimpleNamespace(available=free)
    )
    monkeypatch.setattr(versus_trl, "peak_memory", lambda number, name, threads: 12.3)
    versus_trl.print_memory(threads=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MEMORY) * len(NEEDED_GIB)
    assert lines[0] == (
        f"{MEMORY[0]}: TRL best settings is skipped, for it needs about 7 GiB of memory and "
        "3.5 GiB are free."
    )
    assert lines[1] == f"{MEMORY[0]}; an update's peak: mmgrpo, 12 MiB"
    assert refusal(MEMORY[0], "mmgrpo", 2 * 2**30) is None
    assert refusal(MEMORY[0], "mmgrpo", 2 * 2**30 - 1) is not None


def test_every_kind_has_a_case():
    assert {case.kind for case in CASES} == set(KINDS)


def test_a_system_in_a_process_of_its_own_computes_the_same(tmp_path, capfd):
    case, options = SMALL[0], SimpleNamespace(threads=1, clock="wall")
    save_model(tmp_path, vocabulary=case.vocabulary, size=case.size)
    expected = Mmgrpo(tmp_path, case, fixed_batch(case)).gradient()
    with running(["mmgrpo"], tmp_path, case, options) as systems:
        remote = systems["mmgrpo"]
        assert gradient_error(remote.gradient(), expected) < 1e-6
        assert all(remote.seconds(part) > 0 for part in ("update", "generate", "step"))
        with pytest.raises(SystemExit, match="fly failed"):
            remote.seconds("fly")
    assert "has no attribute 'fly'" in capfd.readouterr().err
