"""The layers of a float32 model on a CPU, in fewer and faster steps: forward and backward.

Linear layers compute :func:`~mmgrpo.policies.products.product`. The norms and the gated networks of
Llama, Qwen and their like have their gradients written down rather than recorded; each class is
tried first, and stays as it is where the results differ.

Shapes: D features.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.linalg import vector_norm
from torch.nn.functional import silu

from mmgrpo.policies.products import is_float_on_cpu, product

TOLERANCE = 1e-5
"""Distance from a layer's own results and gradients, relative to their norm."""

Forward = Callable[[Any, Tensor], Tensor]


def use_fast_layers(network: nn.Module) -> None:
    """Change how the layers of a network compute, not what; nothing where there is a GPU."""
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return
    agrees: dict[type, bool] = {nn.Linear: True}
    for module in network.modules():
        kind, forward = type(module), _fast_forward(module)
        if forward is None or "forward" in vars(module):
            continue
        if kind not in agrees:
            agrees[kind] = _agrees(module, forward)
        if agrees[kind]:
            module.forward = MethodType(forward, module)


def _fast_forward(module: nn.Module) -> Forward | None:
    """What may take the place of a layer's forward pass, by what the layer is made of."""
    if type(module) is nn.Linear:
        return _linear
    if hasattr(module, "variance_epsilon") and hasattr(module, "weight"):
        return _norm
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if all(hasattr(module, part) for part in parts) and _is_silu(module.act_fn):
        return _gated
    return None


def _agrees(module: Any, forward: Forward) -> bool:
    """Whether both forward passes have the same results and gradients."""
    weights = dict(module.named_parameters())
    if len(signature(type(module).forward).parameters) != 2 or not all(
        is_float_on_cpu(weight) and weight.dim() for weight in weights.values()
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    vectors = [name for name, weight in weights.items() if weight.dim() == 1]  # often all ones
    weights |= {n: torch.rand(weights[n].shape, generator=generator) for n in vectors}
    size = module.gate_proj.in_features if forward is _gated else len(module.weight)
    x = torch.randn(3, size, generator=generator)
    try:
        own = _results(module, weights, x)
        module.forward = MethodType(forward, module)
        fast = _results(module, weights, x)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        vars(module).pop("forward", None)
    return all((a - b).norm() <= TOLERANCE * b.norm() for a, b in zip(fast, own, strict=True))


@torch.enable_grad()
def _results(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The output and the gradients of an uneven sum of it."""
    leaves = [value.detach().requires_grad_() for value in (x, *weights.values())]
    given = dict(zip(weights, leaves[1:], strict=True))
    out: Tensor = functional_call(module, given, (leaves[0],))
    uneven = torch.linspace(0.5, 2.0, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * uneven).sum(), leaves)]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return product(x, layer.weight, layer.bias)


def _norm(norm: Any, x: Tensor) -> Tensor:
    if not (is_float_on_cpu(x) and is_float_on_cpu(norm.weight)):
        return type(norm).forward(norm, x)
    return _Norm.apply(x, norm.weight, norm.variance_epsilon)


def _gated(network: Any, x: Tensor) -> Tensor:
    if not is_float_on_cpu(x):
        return type(network).forward(network, x)
    gated = _Gate.apply(network.gate_proj(x), network.up_proj(x))
    return network.down_proj(gated)


def _is_silu(activation: Any) -> bool:
    return type(activation).__name__ in ("SiLUActivation", "SiLU")


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight (RMSNorm, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_length(x, x.new_tensor(eps))
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        each = (grad * normed).flatten(0, -2)
        of_weight = each.sum(dim=0) if ctx.needs_input_grad[1] else None
        along = (each @ weight).view(scale.shape).div_(x.shape[-1])
        return (grad * weight).sub_(normed.mul_(along)).mul_(scale), of_weight, None


class _Gate(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        change = grad * up
        torch.ops.aten.silu_backward.grad_input(change, gate, grad_input=change)
        return change, silu(gate).mul_(grad)


def inverse_length(x: Tensor, eps: Tensor) -> Tensor:
    """Return ``[..., 1]``: 1 / sqrt(mean(x^2) + eps) of ``[..., D]``."""
    length = vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
