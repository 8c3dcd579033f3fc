"""Make torchvision importable where its compiled operators do not fit the installed torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The operators that torchvision describes while it is imported, whether they are there or not."""
_KEPT: list[Any] = []


def ensure_torchvision() -> None:
    """Import torchvision, if it is installed, declaring its operators first if they are missing.

    A torchvision built for CUDA beside a torch for the CPU has no compiled operators, and fails
    over them when it is imported although open_clip and transformers need its transforms only. The
    declared operators have no kernels: calling one raises.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        declare_operators()
        importlib.import_module("torchvision")


def declare_operators() -> None:
    """Declare the operators' schemas, without kernels, for as long as the process lives."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _KEPT.append(library)
