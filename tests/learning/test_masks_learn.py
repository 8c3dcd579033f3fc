"""The mask quickstart learns to point at the right digit, and to stop earlier."""

from mmgrpo.build import train
from mmgrpo.config import load_config
from mmgrpo.tracking import read_metrics


def test_success_rises_and_masks_get_shorter_in_a_short_run(tmp_path):
    changes = [f"run_dir={tmp_path / 'run'}", "trainer.steps=10", "eval.every=null"]
    train(load_config("quickstart/masks", changes))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    success = [row["eval/success"] for row in rows if "eval/success" in row]
    assert success[0] < 0.4
    assert success[-1] >= success[0] + 0.15
    decisions = [row["count/generated_decisions"] for row in rows if "reward/mean" in row]
    assert sum(decisions[-3:]) < 0.8 * sum(decisions[:3])
