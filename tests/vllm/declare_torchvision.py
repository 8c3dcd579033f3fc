"""Lets torchvision be imported beside a torch that its compiled operators do not fit.

``make test-vllm`` copies this file into the site-packages of its environment, with a ``.pth`` that
imports it: vLLM's worker processes need torchvision's transforms, and import it themselves. The
declared operators have no kernels; calling one raises.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
KEPT = []


class DeclareBeforeImport(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is about to be imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision" and not KEPT:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            KEPT.append(library)
            for schema in SCHEMAS:
                library.define(schema)


sys.meta_path.insert(0, DeclareBeforeImport())
