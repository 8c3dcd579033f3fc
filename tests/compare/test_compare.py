"""A contest: equal conditions, honest intervals, finished runs kept, one readable error."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from mmgrpo.cli.compare import columns_that_fit
from mmgrpo.cli.main import main
from mmgrpo.compare import Budget, Contest, execute, parse_entry, run_contest, summarise
from mmgrpo.compare.contest import Entry, task_modality, tasks
from mmgrpo.compare.measure import diversity, from_metrics, from_trajectories, pass_at_all
from mmgrpo.compare.page import insert, markdown, mean_curve, write_page
from mmgrpo.compare.settings import Settings, read_settings
from mmgrpo.compare.summary import Interval, Summary, interval
from mmgrpo.core import Trajectories
from mmgrpo.errors import ConfigError, MmgrpoError
from mmgrpo.protocols import Prompt, Sample

TWO_STEPS = Budget(steps=2)


def contest(out, *texts, seeds=2, budget=TWO_STEPS):
    return Contest("text", tuple(parse_entry(text, "text") for text in texts), seeds, budget, out)


def finish(run_dir, success):
    """A finished run as the folder that training and measuring leave."""
    run_dir.mkdir(parents=True)
    rows = [{"step": 0, "eval/success": 0.4}, {"step": 2, "eval/success": success}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    execute.write_measures(run_dir, {"success/last": success, "time/step_s": 10.0})


def test_a_change_belongs_to_the_method_unless_a_section_has_its_name():
    entry = parse_entry("grpo advantage.scale=none trainer.learning_rate=1e-4", "text")
    assert entry.overrides == ("method.advantage.scale=none", "trainer.learning_rate=1e-4")
    assert entry.label == "grpo advantage.scale=none trainer.learning_rate=1e-4"


def test_every_run_shares_task_weights_and_budget(tmp_path):
    both = contest(tmp_path, "grpo advantage.scale=none", "dapo")
    configs = [both.config(entry, 1).model_dump() for entry in both.entries]
    for config in configs:
        del config["method"], config["run_dir"]
    assert configs[0] == configs[1]
    assert configs[0]["seed"] == 1
    assert configs[0]["trainer"]["steps"] == 2
    assert both.config(both.entries[0], 0).method.overrides == {"advantage": {"scale": "none"}}


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.1, 0.2, 0.4], [1.0, 1.5, 0.0, 2.0, 0.3]])
def test_the_interval_is_student_t(values):
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values)
    )
    found = interval(values)
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-3, abs=1e-3)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-3, abs=1e-3)


def test_one_seed_has_no_interval_and_nothing_is_a_dash():
    assert str(interval([0.25])) == "0.25"
    assert str(interval([math.nan])) == "-"
    assert str(Interval(1234567.0, math.nan)) == "1,234,567"


def test_the_best_comes_first_and_the_page_stands_alone(tmp_path):
    both = contest(tmp_path, "grpo", "dapo advantage.scale=none")
    for seed, (first, second) in enumerate([(0.5, 0.9), (0.7, 1.0)]):
        finish(both.run_dir(both.entries[0], seed), first)
        finish(both.run_dir(both.entries[1], seed), second)
    rows = summarise(both)
    assert [row.entry.method for row in rows] == ["dapo", "grpo"]
    assert rows[1].measures["success/last"].mean == pytest.approx(0.6)
    assert "| dapo advantage.scale=none | - | 0.95 ± " in markdown(rows)
    assert mean_curve(both, both.entries[0], "eval/success") == [(0.0, 0.4), (2.0, 0.6)]
    page = write_page(both, rows).read_text()
    assert "<svg" in page
    assert "dapo advantage.scale=none" in page
    assert "http-equiv" not in page
    assert "src='http" not in page


def test_finished_runs_are_kept_and_a_failed_one_is_named(tmp_path, monkeypatch):
    both = contest(tmp_path, "grpo", "dapo", seeds=1)
    finish(both.run_dir(both.entries[0], 0), 0.5)
    called = []

    def fail(command, environment, run_dir):
        called.append(command)
        raise MmgrpoError("out of memory (see log)")

    monkeypatch.setattr(execute, "_call", fail)
    lines = []
    with pytest.raises(MmgrpoError, match=r"1 of 2 runs failed; dapo \(seed 0\): out of memory"):
        run_contest(both, progress=lines.append)
    assert lines == ["grpo seed 0: done", "dapo seed 0: failed"]
    assert len(called) == 1
    assert "method=dapo" in called[0]


def test_a_wrong_competitor_is_refused_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "_call", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ConfigError, match=r"did you mean 'dapo'"):
        run_contest(contest(tmp_path, "grpo", "dapoo"))
    with pytest.raises(ConfigError, match="named twice"):
        run_contest(contest(tmp_path, "grpo", "grpo"))
    with pytest.raises(ConfigError, match="nothing to compare"):
        run_contest(contest(tmp_path))
    assert main(["compare", "grpo", "--task", "txt", "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_costs_are_sums_and_success_is_first_and_last():
    rows = [
        {"step": 0, "eval/success": 0.4},
        {"step": 1, "reward/mean": 0.5, "count/forward": 3, "time/step_s": 1.0},
        {
            "step": 2,
            "reward/mean": 0.7,
            "count/forward": 4,
            "time/step_s": 2.0,
            "eval/success": 0.9,
        },
    ]
    measures = from_metrics(rows)
    assert (measures["success/first"], measures["success/last"]) == (0.4, 0.9)
    assert (measures["count/forward"], measures["time/step_s"]) == (7, 3.0)
    assert measures["reward/last"] == 0.7


def test_pass_at_k_counts_prompts_with_one_success():
    judged = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    assert pass_at_all(judged, torch.tensor([0, 0, 1, 1, 2, 2])) == pytest.approx(2 / 3)


def test_kl_from_start_is_the_mean_log_ratio_of_own_samples():
    trajectories = Trajectories(
        group=torch.tensor([0, 0]),
        mask=torch.tensor([[1, 1], [1, 0]]),
        old_log_prob=torch.tensor([[-1.0, -2.0], [-0.5, 9.0]]),
    )
    start = torch.tensor([[-1.5, -2.5], [-0.7, -9.0]])
    measures = from_trajectories(trajectories, start)
    assert measures["kl_from_start"] == pytest.approx((1.0 + 0.2) / 2)
    assert measures["length"] == 1.5


# -- budgets, settings, the table ---------------------------------------------------------------


def test_a_budget_is_one_limit_and_ends_the_run():
    assert Budget().overrides() == []
    assert Budget(steps=7).overrides() == ["trainer.steps=7"]
    steps, decisions = Budget(decisions=500).overrides()
    assert decisions == "trainer.max_decisions=500"
    assert int(steps.partition("=")[2]) >= 1_000_000
    assert Budget(seconds=2.5).overrides()[1] == "trainer.max_seconds=2.5"
    with pytest.raises(ConfigError, match="one"):
        Budget(steps=7, seconds=1.0).overrides()


def test_curves_are_drawn_over_what_the_budget_counts(tmp_path):
    one = contest(tmp_path, "grpo", budget=Budget(decisions=100))
    for seed, spent in enumerate((10, 30)):
        folder = one.run_dir(one.entries[0], seed)
        folder.mkdir(parents=True)
        rows = [{"step": 0, "eval/success": 0.4}] + [
            {"step": step, "eval/success": 0.5, "count/generated_decisions": spent}
            for step in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mean_curve(one, one.entries[0], "eval/success") == [(0, 0.4), (20, 0.5), (40, 0.5)]


def test_what_a_preset_needs_at_this_scale_is_set_and_said(tmp_path, monkeypatch):
    known = {"grpo": Settings(("trainer.learning_rate=1e-4",), "small model")}
    monkeypatch.setattr("mmgrpo.compare.contest.read_settings", lambda task: known)
    assert parse_entry("grpo", "text", published=True).settings == Settings()
    assert contest(tmp_path, "dapo").entries[0].settings == Settings()
    both = contest(tmp_path, "grpo", "grpo trainer.learning_rate=3e-4")
    rates = [both.config(entry, 0).trainer.learning_rate for entry in both.entries]
    assert rates == [1e-4, 3e-4]
    rows = [Summary(both.entries[0], {})]
    assert "- grpo: trainer.learning_rate=1e-4; small model" in markdown(rows)


@pytest.mark.parametrize(
    ("first", "last", "learned"), [(0.4, 0.55, True), (0.85, 0.9, True), (0.4, 0.5, False)]
)
def test_learned_is_a_gain_or_a_high_level(first, last, learned):
    measures = {
        "success/first": Interval(first, math.nan),
        "success/last": Interval(last, math.nan),
    }
    assert Summary(Entry("grpo"), measures).learned is learned


def test_the_table_replaces_the_task_s_earlier_one(tmp_path):
    one = contest(tmp_path, "grpo")
    page = tmp_path / "docs" / "methods.md"
    rows = [Summary(Entry("grpo"), {"success/last": Interval(0.5, math.nan)})]
    insert(page, one, rows)
    insert(page, replace(one, task="image"), rows)
    later = [Summary(Entry("dapo"), {"success/last": Interval(0.75, math.nan)})]
    insert(page, one, later)
    text = page.read_text()
    assert text.count("begin text") == text.count("begin image") == 1
    assert "| dapo | - | 0.75 |" in text
    assert text.count("| grpo | - | 0.5 |") == 1
    assert text.index("begin text") < text.index("begin image")


def test_diversity_is_the_root_mean_square_difference_of_pairs():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    samples = [Sample(Prompt(0, "p"), image=Image.fromarray(p)) for p in pictures]
    x = pictures / 255
    pairs = [((x[a] - x[b]) ** 2).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert diversity(samples) == pytest.approx(math.sqrt(np.mean(pairs)))
    assert math.isnan(diversity(samples[:1]))


def test_every_task_has_valid_settings():
    assert {"text", "vision", "image"} <= set(tasks())
    for task in tasks():
        for method in read_settings(task):
            entry = parse_entry(method, task)
            Contest(task, (entry,), 1, Budget(steps=1), Path("unused")).check()
    assert task_modality("image") == "image"


def test_a_narrow_terminal_gets_the_leading_columns_unbroken():
    lines = [["method", "before", "after"], ["flow-grpo", "0.5", "0.9 ± 0.01"]]
    whole = (9 + 3) + (6 + 3) + (10 + 3) + 1
    assert columns_that_fit(lines, whole) == 3
    assert columns_that_fit(lines, whole - 1) == 2
    assert columns_that_fit(lines, 5) == 1
