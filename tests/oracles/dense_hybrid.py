"""The hybrid decoder block by the book: explicit loops over patches, dense masked attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.outer_product import group_norm

HEADS = 8
PATCHES = (4, 8)


def patches(x: Tensor, size: int) -> list[Tensor]:
    """The patches (B, C, size, size) of x (B, C, H, W), row by row; what lies outside repeats the border."""
    height, width = x.shape[2:]
    found = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            rows = [
                torch.stack([x[:, :, min(r, height - 1), min(c, width - 1)] for c in range(left, left + size)], dim=-1)
                for r in range(top, top + size)
            ]
            found.append(torch.stack(rows, dim=-2))
    return found


def layer_norm(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = tokens.mean(dim=-1, keepdim=True)
    variance = ((tokens - mean) ** 2).mean(dim=-1, keepdim=True)
    return (tokens - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def masked_attention(p: dict[str, Tensor], local: Tensor, tokens: Tensor, visible: Tensor) -> Tensor:
    """torch's MultiheadAttention with the parameters p and a dense mask; local (B, L, C), tokens (B, S, C)."""
    attention, weights = F.multi_head_attention_forward(
        local.transpose(0, 1),
        tokens.transpose(0, 1),
        tokens.transpose(0, 1),
        embed_dim_to_check=local.shape[-1],
        num_heads=HEADS,
        in_proj_weight=p["in_proj_weight"],
        in_proj_bias=p["in_proj_bias"],
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=p["out_proj.weight"],
        out_proj_bias=p["out_proj.bias"],
        training=False,
        need_weights=True,  # the path that forms all weights
        attn_mask=~visible,
    )
    assert (weights[:, ~visible] == 0).all()
    return attention.transpose(0, 1)


def transformer(p: dict[str, Tensor], h: Tensor, visible: Tensor) -> Tensor:
    """MSTB: h + A + MLP(LN(A)), h (B, C, H, W), visible boolean (L, S)."""
    embedded = h
    if "shared_patch_embed.weight" in p:
        embedded = F.conv2d(h, p["shared_patch_embed.weight"], p["shared_patch_embed.bias"])
    local = embedded.flatten(2).transpose(1, 2)
    tokens = [layer_norm(local, p["local_norm.weight"], p["local_norm.bias"])]
    for i, size in enumerate(PATCHES):
        for patch in patches(embedded, size):
            if f"patch_projections.{i}.weight" in p:
                token = F.linear(patch.flatten(1), p[f"patch_projections.{i}.weight"], p[f"patch_projections.{i}.bias"])
            else:
                token = patch.mean(dim=(2, 3))
            norm = layer_norm(token, p[f"regional_norms.{i}.weight"], p[f"regional_norms.{i}.bias"])
            tokens.append(norm[:, None])
    a = masked_attention(below(p, "multihead_attn."), tokens[0], torch.cat(tokens, dim=1), visible)
    m = below(p, "mlp.mlp.") or below(p, "mlp.")
    hidden = F.gelu(F.linear(layer_norm(a, p["norm_out.weight"], p["norm_out.bias"]), m["0.weight"], m["0.bias"]))
    a = a + F.linear(hidden, m["3.weight"], m["3.bias"])
    return h + a.transpose(1, 2).reshape(h.shape)


def hybrid_block(p: dict[str, Tensor], x: Tensor, embedding: Tensor, visible: Tensor) -> Tensor:
    """x + fuse(conv branch, transformer branch); x (B, C, H, W), embedding (B, E), visible boolean (L, S)."""
    shift = F.linear(embedding * torch.sigmoid(embedding), p["emb_layers.1.weight"], p["emb_layers.1.bias"])
    h = x + shift[:, :, None, None]
    a = h
    for norm, conv in ((0, 2), (3, 5)):
        a = group_norm(a, p[f"conv_branch.{norm}.weight"], p[f"conv_branch.{norm}.bias"])
        a = a * torch.sigmoid(a)
        a = F.conv2d(a, p[f"conv_branch.{conv}.weight"], p[f"conv_branch.{conv}.bias"], padding=1)
    b = transformer(below(p, "transformer_branch."), h, visible)
    fused = torch.cat([a, b], dim=1) if p["fusion_conv.weight"].shape[1] == 2 * x.shape[1] else (a + b) / 2
    return x + F.conv2d(fused, p["fusion_conv.weight"], p["fusion_conv.bias"])


def below(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
