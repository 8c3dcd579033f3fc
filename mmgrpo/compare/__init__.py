"""An honest head-to-head: same task, seeds, initial weights and budget for every method."""

from mmgrpo.compare.contest import Budget, Contest, Entry, parse_entry
from mmgrpo.compare.execute import run_contest
from mmgrpo.compare.summary import Summary, summarise

__all__ = ["Budget", "Contest", "Entry", "Summary", "parse_entry", "run_contest", "summarise"]
