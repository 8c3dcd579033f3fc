"""Objects in a photo, by a detector of transformers that lies in a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.errors import ConfigError

from .clip_models import check_files
from .scene_rules import Box
from .torchvision_shim import ensure_torchvision

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Detection:
    """One object: its class, confidence in [0, 1], box, and ``[H, W]`` bool mask, if any."""

    name: str
    score: float
    box: Box
    mask: Tensor | None = None


class Detector:
    """A detector that is loaded when first used; pictures go through it one by one.

    Three kinds of model folders are known, told apart by the model type in ``config.json``:
    detectors with classes of their own (DETR, RT-DETR, YOLOS...), those that are given the classes
    as text (OWL-ViT, OWLv2), and instance segmentation (Mask2Former), whose boxes
    are those around its masks.

    Args:
        reward: name of the reward, for errors.
        path: the folder: ``config.json``, ``model.safetensors`` and the processor's files.
        device: where it runs; a GPU if there is one.
        prompt: what a class is asked for with, where classes are text; ``{class}`` is replaced.

    Raises:
        ConfigError: a file is missing, or the model is no detector; it says which.
    """

    def __init__(
        self,
        reward: str,
        path: str,
        device: str | None = None,
        prompt: str = "a photo of a {class}",
    ) -> None:
        check_files(reward, path, ("config.json",), _WEIGHTS, _PROCESSOR)
        config = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        self.kind = _kind(reward, path, config.get("model_type"))
        self.path, self.prompt = path, prompt
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        names = config.get("id2label") or {}
        self.classes: list[str] | None = None if self.kind is KINDS[0] else [*names.values()]
        """The classes it knows; None if they are given as text."""
        self._parts: tuple[Any, Any] | None = None

    def detect(
        self, image: Image.Image, classes: Sequence[str], threshold: float
    ) -> list[Detection]:
        """Return the objects of the classes that are found with more confidence than the threshold.

        The most confident come first.
        """
        if self._parts is None:
            ensure_torchvision()
            self._parts = self.kind.load(self.path, self.device)
        with torch.inference_mode():
            found = self.kind.find(self, image.convert("RGB"), list(classes), threshold)
        kept = [d for d in found if d.name in classes and d.score > threshold]
        return sorted(kept, key=lambda detection: detection.score, reverse=True)

    @property
    def parts(self) -> tuple[Any, Any]:
        """The model and its processor."""
        assert self._parts is not None
        return self._parts

    @property
    def named(self) -> list[str]:
        """The classes by index."""
        labels = self.parts[0].config.id2label
        return [labels[index] for index in sorted(labels)]


@dataclass(frozen=True)
class _Kind:
    """How one kind of model is loaded and used."""

    model: str
    processor: str
    types: Callable[[], Collection[str]]
    find: Callable[[Detector, Image.Image, list[str], float], list[Detection]]

    def load(self, path: str, device: str) -> tuple[Any, Any]:
        import transformers

        model = getattr(transformers, self.model).from_pretrained(path, use_safetensors=True)
        processor = getattr(transformers, self.processor).from_pretrained(path)
        return model.float().eval().requires_grad_(False).to(device), processor


def _owl_types() -> Collection[str]:
    return ("owlvit", "owlv2")


def _detector_types() -> Collection[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    return set(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)


def _mask_types() -> Collection[str]:
    return ("mask2former", "maskformer")


def _find_own(
    detector: Detector, image: Image.Image, _classes: list[str], threshold: float
) -> list[Detection]:
    model, processor = detector.parts
    inputs = processor(images=image, return_tensors="pt").to(detector.device)
    found = processor.post_process_object_detection(
        model(**inputs), threshold=threshold, target_sizes=[image.size[::-1]]
    )[0]
    return _boxes(found, [detector.named[int(label)] for label in found["labels"]])


def _find_named(
    detector: Detector, image: Image.Image, classes: list[str], threshold: float
) -> list[Detection]:
    model, processor = detector.parts
    texts = [detector.prompt.replace("{class}", name) for name in classes]
    inputs = processor(text=[texts], images=image, return_tensors="pt").to(detector.device)
    found = processor.post_process_grounded_object_detection(
        model(**inputs),
        threshold=threshold,
        target_sizes=[image.size[::-1]],
        text_labels=[classes],
    )[0]
    return _boxes(found, found["text_labels"])


def _find_masks(
    detector: Detector, image: Image.Image, _classes: list[str], threshold: float
) -> list[Detection]:
    model, processor = detector.parts
    inputs = processor(images=image, return_tensors="pt").to(detector.device)
    found = processor.post_process_instance_segmentation(
        model(**inputs),
        threshold=threshold,
        target_sizes=[image.size[::-1]],
        return_binary_maps=True,
    )[0]
    if not found["segments_info"]:
        return []
    masks = found["segmentation"].cpu().bool()
    return [
        Detection(detector.named[segment["label_id"]], segment["score"], box_around(mask), mask)
        for segment, mask in zip(found["segments_info"], masks, strict=True)
    ]


def box_around(mask: Tensor) -> Box:
    """Return the smallest box around a mask ``[H, W]`` that is not empty."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    left, right = float(columns.min()), float(columns.max()) + 1
    return left, float(rows.min()), right, float(rows.max()) + 1


def _boxes(found: Mapping[str, Any], names: Sequence[str]) -> list[Detection]:
    scores, boxes = found["scores"].tolist(), found["boxes"].tolist()
    return [
        Detection(name, score, (box[0], box[1], box[2], box[3]))
        for name, score, box in zip(names, scores, boxes, strict=True)
    ]


KINDS: tuple[_Kind, ...] = (
    _Kind("AutoModelForZeroShotObjectDetection", "AutoProcessor", _owl_types, _find_named),
    _Kind("AutoModelForObjectDetection", "AutoImageProcessor", _detector_types, _find_own),
    _Kind("AutoModelForUniversalSegmentation", "AutoImageProcessor", _mask_types, _find_masks),
)
"""What a folder may hold; a type that can be used in several ways is used in the first."""


def _kind(reward: str, path: str, model_type: str | None) -> _Kind:
    for kind in KINDS:
        if model_type in kind.types():
            return kind
    raise ConfigError(
        f"{reward}: '{path}' holds a model of type '{model_type}', which is no detector; expected "
        "a detection model (DETR, RT-DETR, YOLOS, OWLv2...) or Mask2Former."
    )


def without_overlap(found: Sequence[Detection], most: float) -> list[Detection]:
    """Leave out what overlaps a more confident object of its class by ``most`` or more (IoU).

    Args:
        found: the most confident first.
        most: 1 keeps everything.
    """
    kept: list[Detection] = []
    for candidate in found:
        rivals = [other for other in kept if other.name == candidate.name]
        if most >= 1 or all(iou(candidate.box, other.box) < most for other in rivals):
            kept.append(candidate)
    return kept


def iou(box: Box, other: Box) -> float:
    """Return the boxes' intersection over their union, in [0, 1]; 0 for two empty boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(width, 0.0) * max(height, 0.0)
    both = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    union = sum(both) - common
    return common / union if union > 0 else 0.0
