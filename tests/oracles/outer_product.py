"""Condition tokens by the book: the outer product c c^T is formed, projected and attended to, head by head."""

import math

import torch
from torch import Tensor


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-5) -> Tensor:
    """GroupNorm of x (B, C, H, W), group by group."""
    parts = []
    for group in x.chunk(groups, dim=1):
        mean = group.mean(dim=(1, 2, 3), keepdim=True)
        variance = ((group - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
        parts.append((group - mean) / torch.sqrt(variance + eps))
    return torch.cat(parts, dim=1) * weight[:, None, None] + bias[:, None, None]


def condition_tokens(condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """c (B, E), the 1x1 convolution ``encoder_kv`` (2C, E, 1), (2C,) -> its output (B, 2C, E) on c c^T (B, E, E)."""
    outer = condition[:, :, None] * condition[:, None, :]
    return torch.nn.functional.conv1d(outer, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(d)) over the keys; q (B, d, T), k and v (B, d, S) -> (B, d, T)."""
    scores = torch.einsum("bdt,bds->bts", q, k) / math.sqrt(q.shape[1])
    return torch.einsum("bts,bds->bdt", scores.softmax(dim=-1), v)


def attention_block(parameters: dict[str, Tensor], x: Tensor, condition: Tensor, num_heads: int) -> Tensor:
    """x + proj(attention(GN(x))) with E condition tokens before the T positions.

    Args:
        parameters: ``norm.*``, ``qkv.*`` (per head [q; k; v]), ``encoder_kv.*`` (per head [k; v]), ``proj_out.*``.
        x: (B, C, H, W).
        condition: (B, E), zeros for a row without one.

    Returns:
        (B, C, H, W).
    """
    p = parameters
    h = group_norm(x, p["norm.weight"], p["norm.bias"]).flatten(2)
    qkv = torch.nn.functional.conv1d(h, p["qkv.weight"], p["qkv.bias"])
    tokens = condition_tokens(condition, p["encoder_kv.weight"], p["encoder_kv.bias"])
    width = x.shape[1] // num_heads
    heads = []
    for i in range(num_heads):
        q, k, v = qkv[:, 3 * width * i : 3 * width * (i + 1)].split(width, dim=1)
        token_k, token_v = tokens[:, 2 * width * i : 2 * width * (i + 1)].split(width, dim=1)
        heads.append(attention(q, torch.cat([token_k, k], dim=2), torch.cat([token_v, v], dim=2)))
    a = torch.nn.functional.conv1d(torch.cat(heads, dim=1), p["proj_out.weight"], p["proj_out.bias"])
    return x + a.reshape(x.shape)
