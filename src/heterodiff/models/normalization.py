"""GroupNorm, alone or with SiLU, that keeps one map for the backward pass and the memory format of its input."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heterodiff.errors import ConfigError
from heterodiff.models.defaults import LEAN_NORM_GROUPS, NORM_GROUPS

NORM_WAYS = {"cpu": "kernel"}
"""Computation of norms by device type; default: ``kernel``.

``kernel`` is torch's own, in float32: one launch where it takes channels-last maps, else two more that copy them.
``tokens`` reads and writes channels-last maps in their own precision, with statistics in float32: less memory traffic,
but more small launches. Only a measurement on the device tells which is faster.
"""

NCHW_KERNELS = ("cuda", "xpu", "mps")
"""Device types whose group norm takes NCHW maps only."""


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with 32 groups by default, computed in float32 for inputs of less precision."""

    def __init__(self, channels: int):
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x, self, silu=False)


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Give the norms of ``module`` this number of groups.

    Raises:
        ConfigError: no divisor of 32, which channels are multiples of.
    """
    if groups < 1 or NORM_GROUPS % groups:
        raise ConfigError(f"norm_groups: expected a divisor of {NORM_GROUPS}, found {groups}; use {LEAN_NORM_GROUPS}")
    for norm in module.modules():
        if isinstance(norm, GroupNorm32):
            norm.num_groups = groups


def norm_silu(x: Tensor, norm: GroupNorm32) -> Tensor:
    """SiLU(norm(x)), x (B, C, H, W).

    Plain autograd would keep x, norm(x) and the result. Here norm(x) is recomputed in the backward pass, which costs a
    hundredth of a convolution, and the SiLU works in place.
    """
    return _norm(x, norm, silu=True)


def _norm(x: Tensor, norm: GroupNorm32, silu: bool) -> Tensor:
    if torch.compiler.is_compiling():  # compiled code fuses and recomputes by itself
        weight, bias = norm.weight.to(dtype := _wide(x)), norm.bias.to(dtype)
        # torch.group_norm, unlike F.group_norm, accepts one value per group (1x1 maps, 32 channels).
        y = torch.group_norm(x.to(dtype), norm.num_groups, weight, bias, norm.eps)
        return (F.silu(y) if silu else y).to(x.dtype)
    way = NORM_WAYS.get(x.device.type, "kernel")
    return {"kernel": _KernelNorm, "tokens": _TokenNorm}[way].apply(
        x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu
    )


def norm_film(x: Tensor, norm: GroupNorm32, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    """norm(x) (1 + scale) + shift (FiLM, Perez et al. 2018), then SiLU if ``silu``.

    In float32, x and norm(x) are all that is kept for the backward pass, and every bit is that of plain autograd.

    Args:
        x: (B, C, H, W); scale, shift: (B, C, 1, 1).
    """
    kernel = NORM_WAYS.get(x.device.type, "kernel") == "kernel"
    if torch.compiler.is_compiling() or not kernel or x.dtype != _wide(x):
        n = norm(x) * (1 + scale) + shift
        return F.silu(n) if silu else n
    return _FilmNorm.apply(x, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps, silu)


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


class _KernelNorm(torch.autograd.Function):
    """torch's kernels, called directly, since its own autograd makes gradients NCHW on every device but the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        y, mean, rstd = _kernel(x, weight, bias, groups, eps)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        ctx.save_for_backward(x, weight, bias, *(() if silu else (mean, rstd)))
        return _like(F.silu(y, inplace=True) if silu else y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        grad = _kernel_layout(grad, x)
        if ctx.silu:
            y, *statistics = _kernel(x, weight, bias, ctx.groups, ctx.eps)
            grad = torch.ops.aten.silu_backward(grad, y)
        return *_gradients(ctx, grad, x, statistics, weight), None, None, None


class _FilmNorm(torch.autograd.Function):
    """As :class:`_KernelNorm`, with a scale and a shift of each image and channel before the SiLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        y, mean, rstd = _kernel(x, weight, bias, groups, eps)
        n = (y * (1 + scale)).add_(shift)
        ctx.groups, ctx.silu = groups, silu
        ctx.save_for_backward(x, weight, scale, shift, y, mean, rstd)
        return _like(F.silu(n, inplace=True) if silu else n, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, y, *statistics = ctx.saved_tensors
        grad = _kernel_layout(grad, x)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, (y * (1 + scale)).add_(shift))
        to_shift = grad.sum((2, 3), keepdim=True)
        to_scale = (y * grad).sum((2, 3), keepdim=True)
        to_norm = _gradients(ctx, grad * (1 + scale), x, statistics, weight)
        return *to_norm, to_scale, to_shift, None, None, None


def _kernel(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x), and mean and 1/std of each group (B, groups)."""
    weight, bias = weight.to(_wide(x)), bias.to(_wide(x))
    return torch.native_group_norm(_kernel_layout(x, x), weight, bias, *_sizes(x, groups), eps)


def _gradients(ctx: Any, grad: Tensor, x: Tensor, statistics: list[Tensor], weight: Tensor) -> Iterator[Tensor | None]:
    """Gradients of x, weight and bias where ``ctx`` needs them, from that of norm(x).

    That of x is always computed: torch's kernel for channels-last maps on a CPU ends the process without it.
    """
    needed = ctx.needs_input_grad[:3]
    found = torch.ops.aten.native_group_norm_backward(
        grad, _kernel_layout(x, x), *statistics, weight.to(_wide(x)), *_sizes(x, ctx.groups), [True, *needed[1:]]
    )
    every = (_like(found[0], x), *found[1:])
    return (g if n else None for g, n in zip(every, needed, strict=True))


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    batch, channels, height, width = x.shape
    return batch, channels, height * width, groups


def _kernel_layout(map_: Tensor, x: Tensor) -> Tensor:
    """``map_`` in the precision and memory format that the device's kernel expects for ``x``."""
    rows = x.device.type in NCHW_KERNELS or not x.is_contiguous(memory_format=torch.channels_last)
    return map_.to(_wide(x), memory_format=torch.contiguous_format if rows else torch.channels_last)


def _like(map_: Tensor, x: Tensor) -> Tensor:
    """``map_`` in the precision of ``x``, and in channels-last where ``x`` is."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return map_.to(x.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


class _TokenNorm(torch.autograd.Function):
    """Formulas of Wu & He 2018 on channels-last maps, viewed as (B, positions, groups, channels of a group)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        t, mean, rstd = _statistics(x, groups, eps)
        ctx.groups, ctx.silu = groups, silu
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        y = _scaled(t, mean, rstd, weight, bias)
        return _from_groups(F.silu(y, inplace=True) if silu else y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        t, g = _groups(x, ctx.groups), _groups(grad, ctx.groups)
        if ctx.silu:
            g = torch.ops.aten.silu_backward(g, _scaled(t, mean, rstd, weight, bias))
        wide = g.to(_wide(x))
        to_bias = wide.sum(1)  # of each image, (B, groups, channels)
        to_weight = ((wide * t).sum(1) - mean * to_bias) * rstd
        gamma, count = _per_group(weight, t), t[0, :, 0].numel()
        mean_g = (to_bias * gamma).sum(-1, keepdim=True) / count
        mean_gx = (to_weight * gamma).sum(-1, keepdim=True) / count * rstd
        shift = (mean_gx * mean - mean_g) * rstd
        found = torch.addcmul(
            torch.addcmul(shift[:, None], t, (mean_gx * rstd)[:, None], value=-1), wide, (gamma * rstd)[:, None]
        )
        grad_weight, grad_bias = (s.sum(0).flatten().to(weight.dtype) for s in (to_weight, to_bias))
        return _from_groups(found, x), grad_weight, grad_bias, None, None, None


def _groups(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) -> (B, H*W, groups, C / groups); a view when ``x`` is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, groups, x.shape[1] // groups)


def _from_groups(y: Tensor, x: Tensor) -> Tensor:
    """Inverse of :func:`_groups`: a map like ``x``."""
    batch, channels, height, width = x.shape
    return _like(y.view(batch, height, width, channels).permute(0, 3, 1, 2), x)


def _per_group(parameter: Tensor, t: Tensor) -> Tensor:
    """A parameter (C,) for maps ``t`` in groups, as (groups, C / groups)."""
    return parameter.to(_wide(t)).view(t.shape[2:])


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` in groups, and mean and 1/std of each group (B, groups, 1)."""
    t, wide = _groups(x, groups), _wide(x)
    if x.dtype == wide:
        variance, mean = torch.var_mean(t, (1, 3), correction=0)
    else:  # a cancellation in float32 is less than the rounding of the numbers themselves
        mean = t.mean((1, 3), dtype=wide)
        squares = torch.linalg.vector_norm(t, 2, (1, 3), dtype=wide).square() / t[0, :, 0].numel()
        variance = torch.addcmul(squares, mean, mean, value=-1).clamp_min(0)
    return t, mean[..., None], (variance + eps).rsqrt()[..., None]


def _scaled(t: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One scale and one shift of each channel, read and written in the precision of ``t``."""
    scale = _per_group(weight, t) * rstd
    shift = torch.addcmul(_per_group(bias, t), mean, scale, value=-1)
    return torch.addcmul(shift[:, None], t, scale[:, None], out=torch.empty_like(t))
