"""From runs to rows: mean and 95 % interval over seeds. Never imports torch."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from mmgrpo.compare.contest import Contest, Entry
from mmgrpo.compare.execute import read_measures

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom."""
T_LARGE = 1.96


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval (NaN for one seed)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        number = f"{self.mean:.3g}" if abs(self.mean) < 1000 else f"{self.mean:,.0f}"
        return number if math.isnan(self.half_width) else f"{number} ± {self.half_width:.2g}"


GAIN, GOOD = 0.15, 0.9
"""A method has learned where success rose by ``GAIN`` or came to ``GOOD``."""


@dataclass(frozen=True)
class Summary:
    """One competitor's row.

    Attributes:
        entry: the competitor.
        measures: name -> mean and interval over its seeds.
    """

    entry: Entry
    measures: dict[str, Interval]

    @property
    def learned(self) -> bool | None:
        """Whether the mean success rose enough; None where it was not measured."""
        first, last = (self.measures.get(f"success/{end}") for end in ("first", "last"))
        if first is None or last is None:
            return None
        return last.mean >= GOOD or last.mean - first.mean >= GAIN


def summarise(contest: Contest) -> list[Summary]:
    """All competitors, best mean success first."""
    rows = [Summary(entry, _over_seeds(contest, entry)) for entry in contest.entries]
    return sorted(rows, key=lambda row: -_number(row.measures.get("success/last")))


def interval(values: list[float]) -> Interval:
    """Mean and half width of the 95 % interval (Student's t) of independent values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Interval(math.nan, math.nan)
    mean = statistics.fmean(finite)
    if len(finite) == 1:
        return Interval(mean, math.nan)
    freedom = len(finite) - 1
    quantile = T_95[freedom - 1] if freedom <= len(T_95) else T_LARGE
    return Interval(mean, quantile * statistics.stdev(finite) / math.sqrt(len(finite)))


def _over_seeds(contest: Contest, entry: Entry) -> dict[str, Interval]:
    runs = [read_measures(contest.run_dir(entry, seed)) for seed in range(contest.seeds)]
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: interval([run.get(name, math.nan) for run in runs]) for name in names}


def _number(value: Interval | None) -> float:
    return -math.inf if value is None or math.isnan(value.mean) else value.mean
