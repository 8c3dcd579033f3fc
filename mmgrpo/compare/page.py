"""The contest as a terminal table, a Markdown table and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Sequence
from pathlib import Path

from mmgrpo.compare.contest import Contest, Entry
from mmgrpo.compare.summary import Summary
from mmgrpo.tracking.curve import draw_curves, points_of
from mmgrpo.tracking.jsonl import read_metrics

COLUMNS = (
    ("success/first", "success before"),
    ("success/last", "success after"),
    ("pass@1", "pass@1"),
    ("pass@8", "pass@8"),
    ("reward/last", "reward"),
    ("kl_from_start", "KL from start"),
    ("entropy", "entropy"),
    ("length", "decisions per sample"),
    ("groups/uniform_fraction", "uniform groups"),
    ("count/generated_decisions", "generated decisions"),
    ("count/forward", "forwards"),
    ("count/backward", "backwards"),
    ("count/reward_calls", "reward calls"),
    ("time/step_s", "seconds"),
)
CURVES = (("eval/success", "success on held-out prompts"), ("reward/mean", "reward"))
COLOURS = (
    "#0b6e4f", "#c1121f", "#1d4e89", "#e09f3e", "#6a4c93", "#2a9d8f", "#8d5524", "#d81159",
    "#577590", "#606c38",
)  # fmt: skip
STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2rem auto;max-width:72rem;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.3rem .6rem;border-bottom:1px solid #e4e7eb;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
    "img{max-width:20rem;image-rendering:pixelated}figure{display:inline-block;margin:.5rem}"
)


def table(rows: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; columns that no row has are left out."""
    shown = [(k, label) for k, label in COLUMNS if any(k in row.measures for row in rows)]
    cells = [
        [row.entry.label, *(str(row.measures.get(key, "-")) for key, _ in shown)] for row in rows
    ]
    return ["method", *(label for _, label in shown)], cells


def markdown(rows: Sequence[Summary]) -> str:
    """The table in Markdown."""
    header, cells = table(rows)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_page(contest: Contest, rows: Sequence[Summary]) -> Path:
    """Write ``compare.html`` and ``compare.md`` into the contest's folder; return the page."""
    contest.out.mkdir(parents=True, exist_ok=True)
    (contest.out / "compare.md").write_text(markdown(rows), encoding="utf-8")
    header, cells = table(rows)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in cells]
    conditions = (
        f"Same task, initial weights, prompts and budget ({html.escape(_budget(contest))}) for "
        "every method; mean over seeds ± half the 95 % interval."
    )
    title = f"{contest.task}: {len(rows)} methods, {contest.seeds} seeds"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{conditions}</p>",
        "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>",
        *(f"<tr>{line}</tr>" for line in lines),
        "</table>",
        *(draw(contest, rows, name, label) for name, label in CURVES),
        *(pictures(contest, row.entry) for row in rows),
    ]
    page = contest.out / "compare.html"
    page.write_text(
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>" + "\n".join(body),
        encoding="utf-8",
    )
    return page


def draw(contest: Contest, rows: Sequence[Summary], name: str, label: str) -> str:
    """One chart: a line per method, the mean over its seeds at the steps that all of them have."""
    curves = []
    for i, row in enumerate(rows):
        points = mean_curve(contest, row.entry, name)
        if points:
            curves.append((points, row.entry.label, COLOURS[i % len(COLOURS)]))
    return draw_curves(curves, label) if curves else ""


def mean_curve(contest: Contest, entry: Entry, name: str) -> list[tuple[float, float]]:
    """(step, mean over seeds) of a metric."""
    runs = [
        dict(points_of(read_metrics(contest.run_dir(entry, seed) / "metrics.jsonl"), name))
        for seed in range(contest.seeds)
    ]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return [(step, statistics.fmean(run[step] for run in runs)) for step in steps]


def pictures(contest: Contest, entry: Entry) -> str:
    """The first seed's before-and-after picture or transcript."""
    run_dir = contest.run_dir(entry, 0)
    caption = html.escape(entry.label)
    for picture in sorted(run_dir.glob("before_after.*")):
        if picture.suffix == ".png":
            data = base64.b64encode(picture.read_bytes()).decode()
            return (
                f"<figure><img src='data:image/png;base64,{data}'>"
                f"<figcaption>{caption}</figcaption></figure>"
            )
        text = html.escape(picture.read_text(encoding="utf-8")[:4000])
        return f"<details><summary>{caption}: samples</summary><pre>{text}</pre></details>"
    return ""


def _budget(contest: Contest) -> str:
    return ", ".join(contest.budget) or "the quickstart's"
