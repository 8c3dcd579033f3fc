"""Matrix products of float32 layers on a CPU by oneDNN, also in the backward pass.

PyTorch gives these products to MKL, which leaves half of the vector width of some processors
unused. oneDNN adds the same numbers in another order.

Shapes: N rows, D input features, K output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

WORTH = 2**22
"""Multiplications from which a product gains more than the call costs."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` for ``[..., D]`` and ``[K, D]``, differentiable.

    What is not float32 on a CPU, or too small, is computed as PyTorch would.
    """
    if not _fits(x, weight):
        return linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        found: Tensor = _Product.apply(x, weight, bias)
        return found
    return multiply(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what :func:`product` returns, by oneDNN always; not differentiable.

    Args:
        x: ``[..., D]`` float32 on a CPU, in any order of memory.
        weight: ``[K, D]``, in any order of memory, or as oneDNN packs it.
        bias: ``[K]``.
    """
    # The function that compiled models call; the public ones only take oneDNN's own tensors.
    call = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
    found: Tensor = call(x, weight, bias, "none", [], "")
    return found


def packed(weight: Tensor) -> Tensor:
    """Return a copy of a weight in oneDNN's own order, for products with few rows."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())  # noqa: SLF001
    return copy


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a.T @ b`` for ``[N, K]`` and ``[N, D]``; the narrower one is copied."""
    if not _fits(a.t(), b.t()):
        return a.t() @ b
    if a.shape[1] <= b.shape[1]:
        return multiply(a.t(), b.t())
    return multiply(b.t(), a.t()).t()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            multiply(grad, weight.t()) if needs[0] else None,
            transposed_product(flat, x.reshape(-1, x.shape[-1])) if needs[1] else None,
            flat.sum(dim=0) if needs[2] else None,
        )


def is_plain(layer: nn.Module, hooks: int = 0) -> bool:
    """Whether a layer is a linear one without adapters or more ``hooks`` than known."""
    watchers = (layer._forward_hooks, layer._forward_pre_hooks)  # noqa: SLF001 - no other way
    return type(layer) is nn.Linear and [len(x) for x in watchers] <= [0, hooks]


def is_whole(weight: Tensor) -> bool:
    """Whether a weight lies there as it is, not in shards on several devices."""
    return not hasattr(weight, "full_tensor") and weight.numel() > 0


def is_float_on_cpu(x: Tensor) -> bool:
    """Whether a tensor is what oneDNN's float32 products take."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        is_float_on_cpu(x)
        and weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= WORTH
        and not torch.is_autocast_enabled("cpu")
    )
