"""The class condition: its embedding, and the condition tokens of the attention blocks in closed form."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NO_CLASS = -1
"""The class label that means "no condition"."""


def drop_condition(labels: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace labels (B,) by -1 with ``probability`` each (classifier-free guidance, Ho & Salimans 2022)."""
    keep = torch.rand(labels.shape, device=labels.device, generator=generator) >= probability
    return torch.where(keep, labels, NO_CLASS)


def attend_with_condition(
    q: Tensor, k: Tensor, v: Tensor, condition: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Attention over the positions and the E condition tokens.

    The tokens are the columns of the outer product c c^T (E, E) after a 1x1 projection W, b. Column s of that
    product is c c_s, so token s has the key u c_s + b_k and the value w c_s + b_v with u = W_k c, w = W_v c:
    rank one, and the product is never formed. Where c = 0 all E tokens equal (b_k, b_v): one token whose score
    is raised by log E stands for them exactly, because E exp(s) = exp(s + log E).

    Args:
        q, k, v: (B, heads, T, d).
        condition: c (B, E), rows of zeros where there is no condition; None if that is all rows.
        weight, bias: (2 * heads * d, E) and (2 * heads * d,), rows per head [k; v].

    Returns:
        (B, heads, T, d).
    """
    batch, heads, positions, width = q.shape
    per_head = (heads, 2, 1, width)
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    bias = bias.to(q.dtype).view(per_head)
    if condition is None:
        tokens = bias.expand(batch, *per_head)
        score_bias = q.new_zeros(1, positions + 1)
        score_bias[:, 0] = math.log(weight.shape[1])
    else:
        factors = F.linear(condition, weight).to(q.dtype).view(batch, *per_head)
        tokens = factors * condition.to(q.dtype)[:, None, None, :, None] + bias
        score_bias = None
    token_keys, token_values = tokens.unbind(2)
    return F.scaled_dot_product_attention(
        q, torch.cat([token_keys, k], dim=2), torch.cat([token_values, v], dim=2), attn_mask=score_bias
    )
