"""Whole runs of masked diffusion models: ratio, cuts, resuming, adapters, and every preset."""

import pytest
from fixtures_masked import masked_document, write_masked
from fixtures_runs import merged, metrics_of, weight_bytes

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.methods import list_presets, load_method

PRESETS = [n for n in list_presets() if "masked_text" in load_method(n).modalities]
SAMPLED = {"samples": 2, "temperature": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_masked(tmp_path_factory.mktemp("masked"))


def run(folder, run_dir, **changes):
    build.train(load_config(masked_document(folder, run_dir, **changes)))
    return metrics_of(run_dir)


@pytest.mark.parametrize("method", PRESETS)
def test_every_preset_trains(folder, tmp_path, method):
    rows = run(folder, tmp_path / "run", method=method, trainer={"steps": 1})
    assert rows[0]["ratio/first_max_deviation"] < 1e-5
    assert rows[0]["grad_norm"] > 0


def test_the_family_is_there():
    assert {"sepo", "vrpo-llada", "grpo", "rloo"} <= set(PRESETS)


@pytest.mark.parametrize("method", ["grpo", "sepo", "vrpo-llada"])
def test_micro_batches_do_not_change_the_update(folder, tmp_path, method):
    one = run(folder, tmp_path / "one", method=method)
    cut = run(folder, tmp_path / "cut", method=method, trainer={"micro_batch_size": 3})
    for first, second in zip(one, cut, strict=True):
        for name in ("loss", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=2e-4, abs=1e-7), name
    assert one[0]["grad_norm"] > 0


@pytest.mark.parametrize("method", ["grpo", "vrpo-llada"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_a_run_that_was_cut_ends_where_the_whole_one_does(folder, tmp_path, lora, method):
    whole = {
        "method": method,
        "trainer": {"steps": 4, "save_every": 2, "minibatches": 2},
        "model": {"lora": lora},
    }
    rows = run(folder, tmp_path / "whole", **whole)
    run(folder, tmp_path / "cut", **merged(whole, {"trainer": {"steps": 2}}))
    assert run(folder, tmp_path / "cut", **whole) == rows
    assert weight_bytes(tmp_path / "cut") == weight_bytes(tmp_path / "whole")


def test_a_run_leaves_a_folder_that_is_evaluated_and_trains_again(folder, tmp_path):
    judged = {
        "data": {"eval": str(folder / "eval.jsonl")},
        "eval": {"samples": 2, "temperature": 1.0},
    }
    rows = run(folder, tmp_path / "run", **judged)
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    config = load_config(masked_document(folder, tmp_path / "run", **judged))
    found = build.evaluate(config, checkpoint)
    assert found["eval/success"] == pytest.approx(rows[-1]["eval/success"])
    again = run(folder, tmp_path / "again", model={"path": str(checkpoint / "hf")})
    assert again[0]["reward/mean"] > 0
