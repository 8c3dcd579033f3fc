"""What a run leaves behind: metrics, samples, pictures, and the progress bar."""

from mmgrpo.tracking.before_after import before_after, write_summary
from mmgrpo.tracking.console import Console
from mmgrpo.tracking.curve import write_curve
from mmgrpo.tracking.jsonl import JsonlTracker, read_metrics
from mmgrpo.tracking.samples import write_samples

__all__ = [
    "Console",
    "JsonlTracker",
    "before_after",
    "read_metrics",
    "write_curve",
    "write_samples",
    "write_summary",
]
