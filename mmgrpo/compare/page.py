"""The contest as a terminal table, a Markdown table and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmgrpo.compare.contest import Contest, Entry
from mmgrpo.compare.summary import GAIN, GOOD, Summary
from mmgrpo.tracking.curve import Point, draw_curves, points_of
from mmgrpo.tracking.jsonl import read_metrics

COLUMNS = (
    ("success/first", "success before"),
    ("success/last", "success after"),
    ("pass@1", "pass@1"),
    ("pass@8", "pass@8"),
    ("reward/last", "reward"),
    ("kl_from_start", "KL from start"),
    ("entropy", "entropy"),
    ("diversity", "diversity"),
    ("length", "decisions per sample"),
    ("groups/uniform_fraction", "uniform groups"),
    ("count/generated_decisions", "generated decisions"),
    ("count/forward", "forwards"),
    ("count/backward", "backwards"),
    ("count/reward_calls", "reward calls"),
    ("time/step_s", "seconds"),
)
LEARNED = {True: "yes", False: "no", None: "-"}
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
        [
            row.entry.label,
            LEARNED[row.learned],
            *(str(row.measures.get(key, "-")) for key, _ in shown),
        ]
        for row in rows
    ]
    return ["method", "learned", *(label for _, label in shown)], cells


def markdown(rows: Sequence[Summary]) -> str:
    """The table in Markdown, and under it what was set for single methods."""
    header, cells = table(rows)
    lines = [header, ["---"] * len(header), *cells]
    grid = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    notes = settings(rows)
    return grid + ("\n" + "\n".join(f"- {note}" for note in notes) + "\n" if notes else "")


def settings(rows: Sequence[Summary]) -> list[str]:
    """A sentence for each method that did not run as published, or that needs a remark."""
    named = [(row.entry.label, row.entry.settings) for row in rows]
    return [
        f"{label}: " + "; ".join(part for part in (", ".join(found.changes), found.note) if part)
        for label, found in named
        if found.changes or found.note
    ]


def headline(contest: Contest) -> str:
    """The conditions that all methods share, as a sentence."""
    return (
        f"Same task ({contest.task}), initial weights, prompts and budget ({contest.conditions}) "
        f"for every method; mean over {contest.seeds} seeds ± half the 95 % interval. Learned: "
        f"success on held-out prompts rose by at least {GAIN} or came to {GOOD}."
    )


def insert(document: Path, contest: Contest, rows: Sequence[Summary]) -> None:
    """Put the table into a Markdown file, in place of the task's earlier one or at its end."""
    begin, end = (f"<!-- {edge} {contest.task} -->" for edge in ("begin", "end"))
    block = f"{begin}\n{headline(contest)}\n\n{markdown(rows)}{end}"
    text = document.read_text(encoding="utf-8") if document.is_file() else "# Methods compared\n"
    if begin in text and end in text:
        head, tail = text.partition(begin)[0], text.partition(end)[2]
        text = head + block + tail
    else:
        text = f"{text.rstrip()}\n\n## {contest.task}\n\n{block}\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(text, encoding="utf-8")


def write_page(contest: Contest, rows: Sequence[Summary]) -> Path:
    """Write ``compare.html`` and ``compare.md`` into the contest's folder; return the page."""
    contest.out.mkdir(parents=True, exist_ok=True)
    (contest.out / "compare.md").write_text(
        f"{headline(contest)}\n\n{markdown(rows)}", encoding="utf-8"
    )
    header, cells = table(rows)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in cells]
    title = f"{contest.task}: {len(rows)} methods, {contest.seeds} seeds"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(headline(contest))}</p>",
        "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>",
        *(f"<tr>{line}</tr>" for line in lines),
        "</table>",
        "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in settings(rows)) + "</ul>",
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


def mean_curve(contest: Contest, entry: Entry, name: str) -> list[Point]:
    """Mean over seeds of a metric, over the step or over what the budget counts (mean too)."""
    logs = [
        read_metrics(contest.run_dir(entry, seed) / "metrics.jsonl")
        for seed in range(contest.seeds)
    ]
    runs = [dict(points_of(log, name)) for log in logs]
    used = [_used(log, contest.budget.axis) for log in logs]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return [
        (statistics.fmean(x[step] for x in used), statistics.fmean(run[step] for run in runs))
        for step in steps
    ]


def _used(log: Sequence[dict[str, Any]], axis: str | None) -> dict[float, float]:
    """Step -> how much of the budget was used by then."""
    steps = [float(row["step"]) for row in log]
    spent = itertools.accumulate(float(row.get(axis) or 0.0) for row in log) if axis else steps
    return dict(zip(steps, spent, strict=True))


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
