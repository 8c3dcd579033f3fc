"""A segmentation mask written as tokens: form, brevity and overlap with the true mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mmgrpo.core.mask_codec import MaskCodec, MaskCodecConfig
from mmgrpo.errors import ConfigError, nearest

from .mask_files import load_codec, read_mask
from .text import text_of


class Answer(NamedTuple):
    """What a completion says.

    Attributes:
        form: which of the four format conditions hold, see :class:`MaskTokens`.
        num_tokens: n, between the tags.
        codes: the mask tokens among them.
    """

    form: tuple[bool, bool, bool, bool]
    num_tokens: int
    codes: list[int]

    @property
    def valid(self) -> bool:
        """Whether it is a mask."""
        return all(self.form)


def read_answer(text: str, config: MaskCodecConfig) -> Answer:
    """Find tags and mask tokens in a completion.

    What counts lies between the first start tag and the next end tag. There each mask token is one
    token, and so is every other character, as with a tokenizer of bytes; without both tags in this
    order, or with nothing between them, there are none, and neither f3 nor f4 holds.
    """
    _, _, rest = text.partition(config.start)
    inside, end, _ = rest.partition(config.end)
    code = re.escape(config.token).replace(r"\{\}", r"(\d+)")
    found = [int(number) for number in re.findall(code, inside)] if end else []
    codes = [number for number in found if number < config.num_codes]
    others = len(found) - len(codes) + (len(re.sub(code, "", inside)) if end else 0)
    count = len(codes) + others
    form = (
        text.count(config.start) == 1,
        text.count(config.end) == 1,
        0 < count <= config.num_slots,
        count > 0 and not others,
    )
    return Answer(form, count, codes)


def iou(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Intersection over union of two bool masks ``[H, W]``; 1 if both are empty."""
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 1.0


def mask_reward(answer: Answer, overlap: float, *, length_weight: float, limit: int) -> float:
    """R = 0.1 (f1 + f2 + f3 + f4) + w_len (limit - n) + IoU, the last two only of a valid mask.

    >>> form = (True, True, True, True)
    >>> round(mask_reward(Answer(form, 12, []), 0.80, length_weight=1e-3, limit=32), 4)
    1.22
    """
    form = 0.1 * sum(answer.form)
    return form + length_weight * (limit - answer.num_tokens) + overlap if answer.valid else form


class MaskTokens:
    """Score ``<mask>`` ... ``</mask>`` by form, brevity and overlap (ALTo, arXiv:2505.16495).

    R = 0.1 (f1 + f2 + f3 + f4) + length_weight (32 - n) + IoU. f1: exactly one start tag; f2:
    exactly one end tag; f3: 1 to 32 tokens between them; f4: all of them are mask tokens. Unless
    all four hold, length and IoU count 0. The mask is decoded and compared, at the true mask's
    size, with the column ``mask`` (run lengths or a picture's path, see
    :func:`mmgrpo.rewards.mask_files.read_mask`).

    Range [0, 0.4 + 31 length_weight + 1]; for the other measures [0, 1], and whole numbers from 0
    for ``tokens``. A row whose ``mask`` is null scores None; one that cannot be read raises.

    Args:
        path: folder of the mask codec: ``config.json`` and ``model.safetensors``.
        measure: ``reward`` (R), ``iou`` (0 without a valid mask), ``success`` (1 where the IoU
            reaches ``threshold``) or ``tokens`` (n).
        length_weight: w_len.
        threshold: of ``success``.
        root: folder of ground-truth pictures.

    Raises:
        ConfigError: no such folder or measure.
    """

    def __init__(
        self,
        path: str,
        measure: str = "reward",
        length_weight: float = 1e-3,
        threshold: float = 0.5,
        root: str = ".",
    ) -> None:
        measures: dict[str, Callable[[Answer, Any], float]] = {
            "reward": self._reward,
            "iou": self._overlap,
            "success": lambda answer, mask: float(self._overlap(answer, mask) >= threshold),
            "tokens": lambda answer, _mask: float(answer.num_tokens),
        }
        if measure not in measures:
            raise ConfigError(
                f"mask_tokens: unknown measure '{measure}'{nearest(measure, measures)}"
            )
        self.codec: MaskCodec = load_codec(path)
        self.measure = measures[measure]
        self.length_weight = length_weight
        self.root = Path(root)

    def __call__(
        self, completions: list[Any], mask: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each completion; see the class."""
        config = self.codec.config
        return [
            None if truth is None else self.measure(read_answer(text_of(written), config), truth)
            for written, truth in zip(completions, mask, strict=True)
        ]

    def _reward(self, answer: Answer, truth: Any) -> float:
        limit, overlap = self.codec.config.num_slots, self._overlap(answer, truth)
        return mask_reward(answer, overlap, length_weight=self.length_weight, limit=limit)

    def _overlap(self, answer: Answer, truth: Any) -> float:
        true = read_mask(truth, self.root)
        if not answer.valid:
            return 0.0
        logits = self.codec.decode(answer.codes)[None, None]
        if logits.shape[2:] != torch.Size(true.shape):
            logits = F.interpolate(logits, true.shape, mode="bilinear", align_corners=False)
        return iou((logits[0, 0] > 0).numpy(), true)
