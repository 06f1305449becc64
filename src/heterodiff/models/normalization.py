"""GroupNorm, and GroupNorm with SiLU that keeps one map for the backward pass instead of three."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORM_GROUPS = 32


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with 32 groups, computed in float32 for inputs of less precision."""

    def __init__(self, channels: int):
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return _group_norm(x, self.weight, self.bias, self.eps).to(x.dtype)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In float32, or float64 for float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # torch.group_norm, unlike F.group_norm, accepts one value per group (1x1 maps, 32 channels).
    return torch.group_norm(x.to(dtype), NORM_GROUPS, weight.to(dtype), bias.to(dtype), eps)


def norm_silu(x: Tensor, norm: GroupNorm32) -> Tensor:
    """SiLU(norm(x)), x (B, C, H, W).

    Plain autograd keeps x for the norm, norm(x) for the SiLU and the result for whatever follows. Here norm(x) is
    computed again in the backward pass, which costs a hundredth of a convolution, and the SiLU works in place.
    Compiled code fuses and recomputes by itself, so that it gets the plain form.
    """
    if torch.compiler.is_compiling():
        return F.silu(_group_norm(x, norm.weight, norm.bias, norm.eps)).to(x.dtype)
    return _NormSiLU.apply(x, norm.weight, norm.bias, norm.eps)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return F.silu(_group_norm(x, weight, bias, eps), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            x, weight, bias = inputs = [
                t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)
            ]
            y = _group_norm(x, weight, bias, ctx.eps)
        grad = torch.ops.aten.silu_backward(grad.to(y.dtype), y.detach())
        found = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad))
        return (*(next(found) if n else None for n in needed), None)
