"""The backbone computed the slow and obvious way, with the parameters and the outputs of ours."""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterodiff.models.attention.patterns import Grid, make_pattern
from heterodiff.models.blocks import AttentionBlock, to_map, to_tokens
from heterodiff.models.hybrid import REGIONAL_PATCHES, MaskedSelfAttention, SparseSelfAttention
from heterodiff.models.pooled import PooledAttention


def make_naive(model: nn.Module) -> nn.Module:
    """Let the attention of ``model`` form what it is defined by: the E x E product of the condition and all attention
    weights, and in hybrid blocks dense weights under a mask, by ``nn.MultiheadAttention``'s function.
    """
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            module.forward = MethodType(_attention_to_outer_product, module)
        elif isinstance(module, SparseSelfAttention):
            module.forward = MethodType(_dense_masked_attention, module)
        elif isinstance(module, PooledAttention):
            module.forward = MethodType(_attention_to_means, module)
        elif isinstance(module, MaskedSelfAttention):
            module.forward = MethodType(_attention_of_a_scale, module)
    return model


def _attention_to_outer_product(self: AttentionBlock, x: Tensor, condition: Tensor | None) -> Tensor:
    height, width = x.shape[2:]
    qkv = self.qkv(to_tokens(self.norm(x)))
    q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    without = not self.tokens_of_none and (condition is None or not condition.any())
    if self.encoder_kv is not None and not without:
        if condition is None:
            condition = x.new_zeros(len(x), self.encoder_kv.in_channels)
        outer = condition[:, :, None] if self.one_token else condition[:, :, None] * condition[:, None, :]
        tokens = F.conv1d(outer, self.encoder_kv.weight, self.encoder_kv.bias)
        token_k, token_v = tokens.unflatten(1, (self.num_heads, 2, -1)).permute(2, 0, 1, 4, 3)
        k, v = torch.cat([token_k, k], dim=2), torch.cat([token_v, v], dim=2)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return x + to_map(self.proj_out((weights @ v).transpose(1, 2).flatten(2)), height, width)


def _attention_to_means(self: PooledAttention, n: Tensor, condition: Tensor | None) -> Tensor:
    """Head by head, with keys from means over the cells of grids, which are counted out."""
    height, width = n.shape[2:]
    keys = [
        n[
            :, :, height * i // side : -(-height * (i + 1) // side), width * j // side : -(-width * (j + 1) // side)
        ].mean((2, 3))
        for side in (2, 4, 8)
        if side < min(height, width)
        for i in range(side)
        for j in range(side)
    ]
    if height * width <= 64:
        keys += [n[:, :, i, j] for i in range(height) for j in range(width)]
    if self.condition_token is not None:
        if condition is None:
            condition = n.new_zeros(len(n), self.condition_token.in_features)
        keys.append(self.condition_token(condition))
    tokens = torch.stack(keys, dim=1)
    own = to_tokens(n)
    k_weight, v_weight = self.key_value.weight.chunk(2)
    k_bias, v_bias = self.key_value.bias.chunk(2)
    answers = []
    for head in range(self.num_heads):
        rows = slice(32 * head, 32 * head + 32)
        q = own @ self.query.weight[rows].T + self.query.bias[rows]
        k, v = tokens @ k_weight[rows].T + k_bias[rows], tokens @ v_weight[rows].T + v_bias[rows]
        answers.append((q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v)
    return to_map(self.proj_out(torch.cat(answers, dim=-1)), height, width)


def _attention_of_a_scale(self: MaskedSelfAttention, tokens: Tensor) -> Tensor:
    """By torch's own function, under a mask of which the diagonal and a random fifth are hidden."""
    attention = nn.MultiheadAttention(tokens.shape[-1], self.num_heads, batch_first=True, dtype=tokens.dtype)
    attention.load_state_dict(self.state_dict())
    hidden = None
    if (length := tokens.shape[1]) > 64:
        hidden = torch.rand(length, length, generator=torch.Generator().manual_seed(self.seed)) < 0.2
        hidden |= torch.eye(length, dtype=torch.bool)
    return attention(tokens, tokens, tokens, attn_mask=hidden)[0]


def _dense_masked_attention(
    self: SparseSelfAttention, local: Tensor, regional: Tensor, height: int, width: int
) -> Tensor:
    tokens = torch.cat([local, regional], dim=1).transpose(0, 1)
    answer, _ = F.multi_head_attention_forward(
        local.transpose(0, 1),
        tokens,
        tokens,
        embed_dim_to_check=local.shape[-1],
        num_heads=self.num_heads,
        in_proj_weight=self.in_proj_weight,
        in_proj_bias=self.in_proj_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=self.out_proj.weight,
        out_proj_bias=self.out_proj.bias,
        training=self.training,
        need_weights=True,
        attn_mask=~_visible(self, height, width),
    )
    return answer.transpose(0, 1)


def _visible(attention: SparseSelfAttention, height: int, width: int) -> Tensor:
    """The pattern as a mask (L, S), made once a size as our own is."""
    made = attention.__dict__.setdefault("naive_masks", {})
    if (height, width) not in made:
        p = attention.pattern
        pattern = make_pattern(p.kind, Grid(height, width, REGIONAL_PATCHES), p.sparsity, p.max_keys, p.seed)
        made[height, width] = torch.from_numpy(pattern.visible())
    return made[height, width]
