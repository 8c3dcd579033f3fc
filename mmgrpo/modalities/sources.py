"""Where the images that a flow model trains on come from: the policy, its reference, the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmgrpo.data.images import image_refs
from mmgrpo.errors import ConfigError, DataError, nearest
from mmgrpo.methods import Method
from mmgrpo.protocols import Policy, Prompt, RolloutEngine
from mmgrpo.registry import load_target


def training_engine(
    flow: RolloutEngine, policy: Policy, config: Any, method: Method
) -> RolloutEngine:
    """Let the method's weights draw, and the data's own images join, where the run has them.

    Args:
        flow: the engine that draws from the policy.
        policy: the policy.
        config: of a flow modality.
        method: the method.

    Raises:
        ConfigError: columns of images and a method or group size that does not take them.
    """
    drawn = flow
    if method.rollout.drawn_by == "reference":
        drawn = load_target("mmgrpo.rollout.by_reference:ByReference")(flow, policy)
    preferred = getattr(config.data, "preferred_column", None)
    rejected = getattr(config.data, "rejected_column", None)
    if preferred is None:
        if rejected or method.component("pairs") == "given":
            raise ConfigError(
                "data.preferred_column is not set: the pairs of a data set need it, and "
                "data.rejected_column where it holds both images."
            )
        return drawn
    if method.component("pairs") != "given":
        raise ConfigError(
            f"data.preferred_column states the pairs, and the method's pairs are "
            f"'{method.component('pairs')}'; set method.pairs=given."
        )
    engine: Any = load_target("mmgrpo.rollout.stored:StoredEngine")(
        flow, ImageColumns(config.data.train), preferred=preferred, rejected=rejected, drawn=drawn
    )
    engine.check(config.rollout.group_size)
    stored: RolloutEngine = engine
    return stored


class ImageColumns:
    """Opens the images that a row names; relative paths start at the folder of the data."""

    def __init__(self, data: str) -> None:
        path = Path(data).expanduser()
        self.folder = path if path.is_dir() else path.parent

    def __call__(self, prompt: Prompt, column: str) -> Any:
        """Return the RGB image.

        Raises:
            DataError: names the row, and the column or the file.
        """
        if prompt.columns.get(column) is None:
            raise DataError(
                f"{prompt.place}: no image in the column '{column}'"
                f"{nearest(column, prompt.columns)}"
            )
        try:
            refs = image_refs(prompt.columns[column], self.folder)
            if len(refs) != 1:
                raise ValueError(f"expected one image, got {len(refs)}")
            refs[0].check()
        except ValueError as error:
            raise DataError(f"{prompt.place}: column '{column}': {error}.") from None
        return refs[0].open()
