"""The quickstart learns: reward's held-out judge rises, in a short run always, over seeds on call.

The short runs belong to every test run. The three seeds of the issue, the quickstart at its full
length, run with ``make test-seeds``.
"""

import pytest

from mmgrpo.build import train
from mmgrpo.config import load_config
from mmgrpo.tracking import read_metrics

SHORT = {"text": (20, 0.3), "vision": (20, 0.2), "image": (24, 0.2), "image_tokens": (20, 0.2),
         "image_scales": (24, 0.2), "masked_text": (16, 0.1), "shapes": (10, 0.1)}  # fmt: skip
"""Task -> steps of a short run, and how much success must rise by then."""
TASKS = sorted(SHORT)
SOLVED = sorted({*SHORT} - {"shapes"})
"""Tasks that the quickstart brings to nine in ten."""


def success_of(task, run_dir, *changes):
    train(load_config(f"quickstart/{task}", [f"run_dir={run_dir}", *changes]))
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [row["eval/success"] for row in rows if "eval/success" in row]


@pytest.mark.parametrize("task", TASKS)
def test_success_rises_in_a_short_run(task, tmp_path):
    steps, rise = SHORT[task]
    success = success_of(task, tmp_path / "run", f"trainer.steps={steps}", "eval.every=null")
    assert 0.2 <= success[0] <= 0.7
    assert success[-1] >= success[0] + rise


@pytest.mark.seeds
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("task", SOLVED)
def test_the_quickstart_reaches_nine_in_ten(task, seed, tmp_path):
    success = success_of(task, tmp_path / "run", f"seed={seed}")
    assert success[-1] >= 0.9
    assert success[-1] >= success[0] + 0.3


@pytest.mark.seeds
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_draws_more_of_the_coloured_shapes_right(seed, tmp_path):
    success = success_of("shapes", tmp_path / "run", f"seed={seed}")
    assert success[-1] >= success[0] + 0.15
