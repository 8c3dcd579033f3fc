"""``curve.svg``: reward and success over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmgrpo.tracking.jsonl import read_metrics

SERIES = (("reward/mean", "reward", "#9aa5b1"), ("eval/success", "success (held out)", "#0b6e4f"))
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 34, 36

Point = tuple[float, float]


def write_curve(run_dir: str | Path) -> Path | None:
    """Draw ``run_dir/curve.svg`` from ``metrics.jsonl``; None if there is nothing to draw."""
    run_dir = Path(run_dir)
    source = run_dir / "metrics.jsonl"
    rows = read_metrics(source) if source.is_file() else []
    curves = [(points_of(rows, name), label, color) for name, label, color in SERIES]
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return None
    path = run_dir / "curve.svg"
    path.write_text(draw_curves(curves, run_dir.name), encoding="utf-8")
    return path


def points_of(rows: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """Return (step, value) where the metric is a finite number."""
    found = [(float(row["step"]), row.get(name)) for row in rows]
    return [(x, float(y)) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]


def draw_curves(curves: Sequence[tuple[Sequence[Point], str, str]], title: str) -> str:
    """Return an SVG with one line per (points, label, colour) over common axes."""
    points = [point for curve, _, _ in curves for point in curve]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 6)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 5)

    def place(x: float, y: float) -> Point:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [_text(LEFT, 18, title, anchor="start", color="#222", size=13)]
    for value in y_ticks:
        _, y = place(x_ticks[0], value)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#e4e7eb"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", anchor="end"))
    below = HEIGHT - BOTTOM + 16
    parts += [_text(place(value, y_ticks[0])[0], below, f"{value:g}") for value in x_ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "step"))
    legend = WIDTH - RIGHT
    for curve, label, color in curves:
        parts.append(_line([place(*point) for point in curve], color))
        parts.append(_text(legend, 18, label, anchor="end", color=color, size=12))
        legend -= 8 * len(label) + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers, at most ``count + 1``, that enclose [low, high].

    >>> ticks(0.0, 0.93, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    size = max(abs(low), abs(high))
    span = high - low
    raw = (span if span > 1e-4 * size else max(size, 1.0)) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10, 20, 50) if _steps(low, high, m * power) <= count)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(index * step, 12) for index in range(first, last + 1)]


def _steps(low: float, high: float, step: float) -> int:
    return math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9)


def _line(points: Sequence[Point], color: str) -> str:
    path = "L".join(f"{x} {y}" for x, y in points)
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in points[-1:])
    line = f'<path d="M{path}" fill="none" stroke-width="2"/>'
    return f'<g stroke="{color}" fill="{color}">{line}{dots}</g>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", color: str = "#52606d", size: int = 11
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
