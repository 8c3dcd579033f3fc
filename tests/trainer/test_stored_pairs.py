"""Runs on images of the data set: from the file to the weights, and what is refused."""

import json

import numpy as np
import pytest
import torch
from fixtures_runs import document, merged, metrics_of, weight_bytes
from PIL import Image

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.errors import ConfigError, DataError

BOTH = {"preferred_column": "good", "rejected_column": "bad"}
SIZE = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four prompts, each with a bright and a dark picture beside the data file."""
    folder = tmp_path_factory.mktemp("stored")
    stream = np.random.default_rng(0)
    rows = []
    for number in range(4):
        for name, low in (("good", 128), ("bad", 0)):
            pixels = stream.integers(low, low + 128, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number}.png")
        rows.append(
            {"prompt": f"draw {number}", "good": f"good{number}.png", "bad": f"bad{number}.png"}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(models, folder, run_dir, **changes):
    base = {
        "method": {"id": "diffusion-dpo", "pairs": "given"},
        "data": {"train": str(folder / "train.jsonl"), **BOTH},
        "rollout": {"group_size": 2, "prompts_per_step": 4},
        "trainer": {"steps": 3},
    }
    return load_config(document(models, "image", run_dir, **merged(base, changes)))


def parts_of(settings):
    parts = build.assemble(settings)
    prompts = parts.prompts.batch(0, 4)
    return parts, parts.engine.generate(prompts, group_size=2, seed=0)


def test_a_run_learns_what_the_data_prefers(models, data, tmp_path):
    settings = config(models, data, tmp_path / "run", trainer={"steps": 6})
    build.train(settings)
    rows = metrics_of(tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] < 0.6
    assert all(row["reward/mean"] == pytest.approx(rows[0]["reward/mean"]) for row in rows)


def test_micro_batches_do_not_change_a_step(models, data, tmp_path):
    for name, size in (("whole", None), ("cut", 2)):
        build.train(
            config(models, data, tmp_path / name, trainer={"steps": 1, "micro_batch_size": size})
        )
    whole, cut = (metrics_of(tmp_path / name)[0] for name in ("whole", "cut"))
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert cut["count/backward"] == 4
    assert whole["count/backward"] == 1


def test_the_same_run_twice_is_bit_for_bit_the_same(models, data, tmp_path):
    for name in ("one", "other"):
        build.train(config(models, data, tmp_path / name, trainer={"steps": 2}))
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "other")


def test_seppo_draws_against_the_datas_images(models, data, tmp_path):
    parts, rollout = parts_of(
        config(
            models, data, tmp_path / "run",
            method={"id": "seppo", "pairs": "given"}, data={"rejected_column": None},
        )
    )  # fmt: skip
    colours = [np.asarray(sample.image).min() for sample in rollout.samples]
    assert all(low >= 128 for low in colours[::2])
    assert rollout.trajectories.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert type(parts.policy.reference_weights).__name__ == "CheckpointBank"
    with torch.no_grad():
        for parameter in parts.policy.network.parameters():
            parameter.mul_(1.1)
    again = parts.engine.generate(parts.prompts.batch(0, 4), group_size=2, seed=0)
    kept = again.trajectories.payload.clean
    assert torch.equal(kept, rollout.trajectories.payload.clean)  # the initial weights draw


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": {"pairs": "best_worst"}}, ConfigError, "set method.pairs=given"),
        (
            {"data": {"preferred_column": None, "rejected_column": None}},
            ConfigError,
            "data.preferred_column is not set",
        ),
        ({"rollout": {"group_size": 3}}, ConfigError, "group_size is 3"),
        ({"data": {"rejected_column": "bda"}}, DataError, "train.jsonl:1: .*'bda'.*mean 'bad'"),
        ({"method": {"id": "d3po"}}, ConfigError, "no denoising steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    models, data, tmp_path, changes, error, message
):
    with pytest.raises(error, match=message):
        build.assemble(config(models, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_an_image_that_is_not_there_names_the_row_and_the_file(models, data, tmp_path):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows[2]["good"] = str(tmp_path / "nowhere.png")
    for row in rows:
        row["bad"] = str(data / row["bad"])
        row["good"] = str(data / row["good"])
    rows[2]["good"] = "nowhere.png"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"train.jsonl:3: column 'good': .*nowhere.png.* not exist"):
        parts_of(config(models, tmp_path, tmp_path / "run"))
