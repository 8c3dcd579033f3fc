"""An image classifier as the judge of what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.errors import ConfigError, MissingResourceError, nearest

REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda probability, _right: probability.mean(dim=1),
    "product": lambda probability, _right: probability.prod(dim=1),
    "all_correct": lambda _probability, right: right.all(dim=1).float(),
}
"""From the right classes' probability and being most probable, each ``[B, cells]``, to ``[B]``."""


class ClassifierScore:
    """Score pictures by the probability that a classifier gives to the right classes.

    The picture is cut into a grid of cells, row by row; each cell is classified and compared with
    its entry in the column ``labels`` (class indices).

    Range [0, 1]. ``mean`` and ``product`` reduce the probabilities of the right classes over the
    cells; ``all_correct`` is 1 where every cell's most probable class is right, else 0. Any picture
    has a score. A row whose ``labels`` is null scores None; the wrong number of labels, or a label
    that is not a class, raises ValueError.

    Args:
        path: folder of an image classifier that ``AutoModelForImageClassification`` loads, with
            its image processor.
        grid: cells per column and per row.
        reduce: ``mean``, ``product`` or ``all_correct``.
        device: where it runs; a GPU if there is one.
        batch_size: cells per forward pass.

    Raises:
        ConfigError: no such folder or reduction.
    """

    def __init__(
        self,
        path: str,
        grid: Sequence[int] = (1, 2),
        reduce: str = "mean",
        device: str | None = None,
        batch_size: int = 256,
    ) -> None:
        if not (Path(path) / "config.json").is_file():
            raise MissingResourceError(
                f"classifier_score: '{path}' is not a model folder (no config.json)."
            )
        if reduce not in REDUCTIONS:
            raise ConfigError(
                f"classifier_score: unknown reduce '{reduce}'{nearest(reduce, REDUCTIONS)}"
            )
        self.path = path
        self.rows, self.columns = (int(cells) for cells in grid)
        self.reduce = REDUCTIONS[reduce]
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size
        self._loaded: tuple[Any, Any] | None = None

    def __call__(
        self, images: list[Image.Image], labels: list[list[int] | None], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        scored = [number for number, wanted in enumerate(labels) if wanted is not None]
        scores: list[float | None] = [None] * len(images)
        if not scored:
            return scores
        target = torch.tensor([self._checked(labels[number]) for number in scored])
        probability = self.probabilities([images[number] for number in scored])
        of_right = probability.gather(2, target[:, :, None]).squeeze(2)
        values = self.reduce(of_right, probability.argmax(dim=2) == target)
        for number, value in zip(scored, values.tolist(), strict=True):
            scores[number] = value
        return scores

    def _checked(self, labels: Any) -> list[int]:
        labels = [labels] if isinstance(labels, int) else list(labels)
        cells, classes = self.rows * self.columns, self._model[1].config.num_labels
        if len(labels) != cells:
            raise ValueError(f"expected {cells} labels, one per cell of the grid; got {labels}")
        if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
            raise ValueError(f"labels must be class indices from 0 to {classes - 1}; got {labels}")
        return labels

    @torch.inference_mode()
    def probabilities(self, images: list[Image.Image]) -> Tensor:
        """Return ``[B, cells, classes]`` float32 on the CPU."""
        processor, model = self._model
        cells = [cell for image in images for cell in self._cells(image)]
        parts = []
        for start in range(0, len(cells), self.batch_size):
            batch = processor(images=cells[start : start + self.batch_size], return_tensors="pt")
            logits = model(**batch.to(self.device)).logits
            parts.append(logits.float().softmax(dim=-1).cpu())
        return torch.cat(parts).unflatten(0, (len(images), self.rows * self.columns))

    def _cells(self, image: Image.Image) -> list[Image.Image]:
        image = image.convert("RGB")
        x = [round(image.width * column / self.columns) for column in range(self.columns + 1)]
        y = [round(image.height * row / self.rows) for row in range(self.rows + 1)]
        return [
            image.crop((x[column], y[row], x[column + 1], y[row + 1]))
            for row in range(self.rows)
            for column in range(self.columns)
        ]

    @property
    def _model(self) -> tuple[Any, Any]:
        """The processor and the model, loaded when first used."""
        if self._loaded is None:
            from transformers import AutoImageProcessor, AutoModelForImageClassification

            processor = AutoImageProcessor.from_pretrained(self.path)
            model = AutoModelForImageClassification.from_pretrained(self.path)
            self._loaded = (processor, model.eval().to(self.device))
        return self._loaded
