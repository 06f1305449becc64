"""The decoder block of ``hae-v3``: a residual block whose second half has an attention branch to pooled maps."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterodiff.models.blocks import ResBlock, recomputed, to_map, to_tokens, zero_
from heterodiff.models.defaults import HEAD_CHANNELS
from heterodiff.models.normalization import GroupNorm32, norm_film

POOLED_SIDES = (2, 4, 8)
MOST_OWN_KEYS = 64
"""Maps of at most this many positions are their own keys too; on larger ones the convolution sees what is near."""


class PooledAttention(nn.Module):
    """Attention of all positions to averages over a grid of the map, and to one token of the condition.

    Args:
        channels: of the map, a multiple of 32; heads are 32 wide.
        condition_dim: width E of the condition's embedding; None for a network without a condition.
    """

    def __init__(self, channels: int, condition_dim: int | None):
        super().__init__()
        self.num_heads = channels // HEAD_CHANNELS
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.condition_token = None if condition_dim is None else nn.Linear(condition_dim, channels)
        self.proj_out = zero_(nn.Linear(channels, channels))

    def forward(self, n: Tensor, condition: Tensor | None) -> Tensor:
        """n (B, C, H, W), condition (B, E) or None (no row has one) -> (B, C, H, W)."""
        height, width = n.shape[2:]
        own = to_tokens(n)
        pooled = [to_tokens(F.adaptive_avg_pool2d(n, side)) for side in POOLED_SIDES if side < min(height, width)]
        tokens = [*pooled, own] if height * width <= MOST_OWN_KEYS else pooled
        if self.condition_token is not None:
            bias = self.condition_token.bias.expand(len(n), -1)
            token = bias if condition is None else self.condition_token(condition.to(n.dtype))
            tokens = [*tokens, token[:, None].to(n.dtype)]
        q = self.query(own).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.key_value(torch.cat(tokens, dim=1)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        answer = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return to_map(self.proj_out(answer), height, width)


class PooledResBlock(ResBlock):
    """Residual block with scale and shift (FiLM), and :class:`PooledAttention` beside its second convolution.

    As the attention's projection starts at zero, it starts as the residual block that it is without it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, dropout: float, condition_dim: int | None
    ):
        super().__init__(in_channels, out_channels, embedding_dim, dropout, use_scale_shift_norm=True)
        self.attention = PooledAttention(out_channels, condition_dim)

    def _answered(self, h: Tensor, e: Tensor, condition: Tensor | None) -> Tensor:
        scale, shift = e.chunk(2, dim=1)
        n = norm_film(h, cast(GroupNorm32, self.out_layers[0]), scale, shift, silu=False)
        return self.out_layers[1:](n).add_(self.attention(n, condition))

    def forward(  # type: ignore[override]
        self, x: Tensor, embedding: Tensor, condition: Tensor | None, recompute: bool = False
    ) -> Tensor:
        """x (B, C_in, H, W), SiLU of the embedding (B, E), condition (B, E) or None -> (B, C_out, H, W).

        Args:
            recompute: compute all but the convolutions' inputs again in the backward pass.
        """
        run = recomputed if recompute else lambda layer, *inputs: layer(*inputs)
        h = run(self.in_layers, x)
        e = self.emb_layers(embedding)[:, :, None, None]
        return run(self._answered, h, e, condition).add_(self.skip_connection(x))
