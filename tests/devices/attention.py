"""Fused attention: one kernel forward and one backward, where CUDA has one for the arguments."""

from typing import Any

import torch

from tests.devices.counting import LAUNCH, record
from tests.devices.tensor import DeviceTensor, to_raw

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def _has_kernel(query: torch.Tensor, mask: torch.Tensor | None, dropout_p: float) -> bool:
    """Flash attention pads any width, but takes 16 bits and no mask; efficient attention takes whole 16 bytes."""
    if dropout_p > 0:
        return False
    width, size = query.shape[-1], query.element_size()
    return (size == 2 and mask is None) or width * size % 16 == 0


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Any:
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        record(LAUNCH, str(SDPA))
        return DeviceTensor(SDPA(*map(to_raw, (query, key, value, mask)), 0.0, **options))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            raws = [None if t is None else t.raw.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
            out = SDPA(*raws, 0.0, **ctx.options)
        wanted = [raw for raw in raws if raw is not None and raw.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, to_raw(grads[0])))
        record(LAUNCH, f"{SDPA} backward")
        return *(DeviceTensor(next(found)) if raw is not None and raw.requires_grad else None for raw in raws), None


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
    """``F.scaled_dot_product_attention`` on the device."""
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if not all(isinstance(t, DeviceTensor) for t in tensors):
        raise RuntimeError("Expected all tensors to be on the same device (scaled_dot_product_attention)")
    if _has_kernel(query, attn_mask, dropout_p):
        return _Fused.apply(query, key, value, attn_mask, options)
    math = torch.ops.aten._scaled_dot_product_attention_math.default
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]
