"""Whole runs of next-scale generators: ratio, cuts, resuming, adapters, and every preset."""

import pytest
from fixtures_runs import merged, metrics_of, weight_bytes
from fixtures_scales import scales_document, write_scales

from mmgrpo import build
from mmgrpo.api import infer_modality
from mmgrpo.config import load_config
from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.methods import list_presets, load_method

BY_SCALE = {"id": "var-grpo", "aggregate": "sequence_mean_segment_mean"}
PRESETS = [n for n in list_presets() if "image_scales" in load_method(n).modalities]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scales(tmp_path_factory.mktemp("scales"))


def run(folder, run_dir, **changes):
    build.train(load_config(scales_document(folder, run_dir, **changes)))
    return metrics_of(run_dir)


@pytest.mark.parametrize("method", PRESETS)
def test_every_preset_trains(folder, tmp_path, method):
    rows = run(folder, tmp_path / "run", method=method, trainer={"steps": 1})
    assert rows[0]["ratio/first_max_deviation"] < 1e-5
    assert rows[0]["grad_norm"] > 0
    samples, rest = divmod(rows[0]["count/generated_decisions"], 9)
    assert samples >= 16  # more with greedy samples, and where sampling is dynamic
    assert rest == 0


def test_it_is_among_the_token_methods():
    assert {"var-grpo", "grpo", "dapo", "rloo", "gspo", "dr-grpo"} <= set(PRESETS)


@pytest.mark.parametrize("method", ["var-grpo", BY_SCALE], ids=["flat", "by_scale"])
def test_micro_batches_do_not_change_the_update(folder, tmp_path, method):
    one = run(folder, tmp_path / "one", method=method)
    cut = run(folder, tmp_path / "cut", method=method, trainer={"micro_batch_size": 3})
    for first, second in zip(one, cut, strict=True):
        for name in ("loss", "grad_norm", "kl"):
            assert second[name] == pytest.approx(first[name], rel=2e-4, abs=1e-7), name
    assert one[1]["kl"] > 0


def test_counting_by_scale_is_another_update(folder, tmp_path):
    flat = run(folder, tmp_path / "flat", trainer={"steps": 1})
    by_scale = run(folder, tmp_path / "scale", method=BY_SCALE, trainer={"steps": 1})
    assert by_scale[0]["reward/mean"] == flat[0]["reward/mean"]
    assert by_scale[0]["grad_norm"] != pytest.approx(flat[0]["grad_norm"], rel=0.01)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_a_run_that_was_cut_ends_where_the_whole_one_does(folder, tmp_path, lora):
    whole = {"trainer": {"steps": 4, "save_every": 2, "minibatches": 2}, "model": {"lora": lora}}
    rows = run(folder, tmp_path / "whole", **whole)
    run(folder, tmp_path / "cut", **merged(whole, {"trainer": {"steps": 2}}))
    assert run(folder, tmp_path / "cut", **whole) == rows
    assert weight_bytes(tmp_path / "cut") == weight_bytes(tmp_path / "whole")


def test_a_run_leaves_a_folder_that_is_evaluated_and_trains_again(folder, tmp_path):
    judged = {"data": {"eval": str(folder / "eval.jsonl")}, "eval": {"samples": 2}}
    rows = run(folder, tmp_path / "run", **judged)
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    config = load_config(scales_document(folder, tmp_path / "run", **judged))
    found = build.evaluate(config, checkpoint)
    assert found["eval/success"] == pytest.approx(rows[-1]["eval/success"])
    again = run(folder, tmp_path / "again", model={"path": str(checkpoint / "hf")})
    assert again[0]["reward/mean"] > 0
    out = build.sample(config, checkpoint, tmp_path / "out")
    assert any(out.parent.rglob("*.png"))


def test_the_folder_says_what_it_is(folder, tmp_path):
    assert infer_modality(folder / "model") == "image_scales"
    doc = scales_document(folder, tmp_path / "run")
    assert "at most 144 decisions" in build.plan(load_config(doc))
    doc["model"]["path"] = "somewhere/else"
    assert "decisions as the model says" in build.plan(load_config(doc))
    with pytest.raises(ModelError, match=r"has no config.json"):
        build.train(load_config(doc))
    doc["rollout"]["top_p"] = 0.9
    with pytest.raises(ConfigError, match="top_p"):
        load_config(doc)
    assert not (tmp_path / "run").exists()
