"""``configs/compare/<task>.yaml``: what presets need at a task's scale beside what they publish.

Published settings fit models of billions of weights. A line such as ``awm: {changes:
[trainer.learning_rate=1.0e-4], note: why}`` says what differs on the playground; every table lists
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from mmgrpo.config.paths import packaged_folder


@dataclass(frozen=True)
class Settings:
    """What a preset needs at a task's scale.

    Attributes:
        changes: ``key=value`` changes of the run.
        note: why, or why the method cannot show its worth there.
    """

    changes: tuple[str, ...] = ()
    note: str = ""


AS_PUBLISHED = Settings()
"""Nothing beside the preset."""


def read_settings(task: str) -> dict[str, Settings]:
    """Preset id -> its settings; presets without a line run as published."""
    file = packaged_folder("mmgrpo.configs") / "compare" / f"{task}.yaml"
    if not file.is_file():
        return {}
    document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return {
        method: Settings(tuple(entry.get("changes", ())), entry.get("note", ""))
        for method, entry in document.items()
    }
