"""Whole denoisers by the book: functions of named weights, without a class of ours.

Everything but the sparse pattern of hybrid blocks, which is ours by definition, is computed anew: embeddings, residual
blocks, resampling, condition tokens by their outer product, hybrid blocks with dense masked attention.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heterodiff.models.attention.patterns import Grid, make_pattern
from tests.oracles.dense_hybrid import PATCHES, below, hybrid_block
from tests.oracles.outer_product import attention, attention_block, group_norm

Weights = dict[str, Tensor]


def predict(weights: Weights, config: dict[str, Any], x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """The output (B, C, H, W) of the denoiser that has ``weights`` by name and diffusers' ``config``.

    Args:
        x: (B, C, H, W), of the precision of ``weights``.
        t: (B,) timesteps.
        condition: class labels (B,), -1 for none; or vectors (B, D), zeros for none.
    """
    c = embed_condition(weights, condition)
    embedding = mlp(below(weights, "time_embed."), sinusoids(t, config["model_channels"]).to(x)) + c
    patch = config.get("patch_size", 1)
    h, skips = F.pixel_unshuffle(x, patch), []
    for stage in numbered(below(weights, "input_blocks.")):
        h = run_stage(stage, config, h, embedding, c)
        skips.append(h)
    h = run_stage(below(weights, "middle_block."), config, h, embedding, c)
    for stage in numbered(below(weights, "output_blocks.")):
        h = run_stage(stage, config, torch.cat([h, skips.pop()], dim=1), embedding, c)
    return F.pixel_shuffle(norm_silu_conv(below(weights, "out."), h, conv=2), patch)


def numbered(weights: Weights) -> list[Weights]:
    """The weights below 0., 1., ..."""
    numbers = {int(name.split(".")[0]) for name in weights}
    return [below(weights, f"{i}.") for i in sorted(numbers)]


def sinusoids(t: Tensor, width: int) -> Tensor:
    """[cos(t w_i), sin(t w_i)], w_i = 10000^(-i / half), (B, width) float64."""
    half = width // 2
    angles = torch.stack([t.double() * math.exp(-math.log(10000) * i / half) for i in range(half)], dim=1)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def mlp(p: Weights, x: Tensor) -> Tensor:
    return F.linear(silu(F.linear(x, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])


def embed_condition(weights: Weights, condition: Tensor) -> Tensor:
    """c (B, E), with a row of zeros where there is no condition."""
    rows = []
    for row in condition:
        if condition.ndim == 1:
            given, embedded = row >= 0, mlp(below(weights, "class_emb."), weights["label_emb.weight"][row.clamp(min=0)])
        else:
            given, embedded = row.any(), mlp(below(weights, "condition_emb."), row @ weights["condition_whitening"])
        rows.append(embedded if given else torch.zeros_like(embedded))
    return torch.stack(rows)


def run_stage(stage: Weights, config: dict[str, Any], h: Tensor, embedding: Tensor, c: Tensor) -> Tensor:
    """Layer after layer; the names of its weights tell what a layer is."""
    for layer in numbered(stage):
        if "in_layers.0.weight" in layer:
            h = res_block(layer, h, embedding, c)
        elif "encoder_kv.weight" in layer and config["condition_tokens"] == "one":
            h = self_attention(layer, h, number_of_heads(config, h.shape[1]), c)
        elif "encoder_kv.weight" in layer:
            h = attention_block(layer, h, c, number_of_heads(config, h.shape[1]))
        elif "qkv.weight" in layer:
            h = self_attention(layer, h, number_of_heads(config, h.shape[1]))
        elif "fusion_conv.weight" in layer:
            h = hybrid_block(layer, h, embedding, visible(config, h.shape[2], h.shape[3]))
        elif "transformer_block.scale_fusion.weight" in layer:
            h = published_block(layer, h, embedding, c, config["pattern_seed"])
        elif "conv.weight" in layer:
            doubled = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = F.conv2d(doubled, layer["conv.weight"], layer["conv.bias"], padding=1)
        elif "op.weight" in layer:
            h = F.conv2d(h, layer["op.weight"], layer["op.bias"], stride=2, padding=1)
        else:
            h = F.conv2d(h, layer["weight"], layer["bias"], padding=1)
    return h


def norm_silu_conv(p: Weights, h: Tensor, conv: int) -> Tensor:
    h = silu(group_norm(h, p["0.weight"], p["0.bias"]))
    return F.conv2d(h, p[f"{conv}.weight"], p[f"{conv}.bias"], padding=1)


def res_block(p: Weights, x: Tensor, embedding: Tensor, c: Tensor) -> Tensor:
    """The residual block of ADM: the embedding is added, or scales and shifts where it has two numbers a channel.

    With weights of an attention, its answer is added to the second convolution's.
    """
    h = norm_silu_conv(below(p, "in_layers."), x, conv=2)
    e = F.linear(silu(embedding), p["emb_layers.1.weight"], p["emb_layers.1.bias"])[:, :, None, None]
    out = below(p, "out_layers.")
    if e.shape[1] == h.shape[1]:
        h = norm_silu_conv(out, h + e, conv=3)
    else:
        scale, shift = e.chunk(2, dim=1)
        n = group_norm(h, out["0.weight"], out["0.bias"]) * (1 + scale) + shift
        h = F.conv2d(silu(n), out["3.weight"], out["3.bias"], padding=1)
        if "attention.query.weight" in p:
            h = h + pooled_attention(below(p, "attention."), n, c)
    if "skip_connection.weight" in p:
        x = F.conv2d(x, p["skip_connection.weight"], p["skip_connection.bias"])
    return x + h


def pooled_attention(p: Weights, n: Tensor, c: Tensor) -> Tensor:
    """Heads of 32 channels; keys are means over the cells of grids, all positions where they are few, and c."""
    height, width = n.shape[2:]
    tokens = [n.flatten(2)] if height * width <= 64 else []
    for side in (2, 4, 8):
        if side < min(height, width):
            rows = [slice(height * i // side, math.ceil(height * (i + 1) / side)) for i in range(side)]
            columns = [slice(width * j // side, math.ceil(width * (j + 1) / side)) for j in range(side)]
            tokens += [n[:, :, row, column].mean((2, 3))[:, :, None] for row in rows for column in columns]
    tokens.append(F.linear(c, p["condition_token.weight"], p["condition_token.bias"])[:, :, None])
    q = F.conv1d(n.flatten(2), p["query.weight"][:, :, None], p["query.bias"])
    k, v = F.conv1d(torch.cat(tokens, dim=2), p["key_value.weight"][:, :, None], p["key_value.bias"]).chunk(2, dim=1)
    heads = zip(q.split(32, dim=1), k.split(32, dim=1), v.split(32, dim=1), strict=True)
    answer = torch.cat([attention(*rows) for rows in heads], dim=1)
    return F.conv1d(answer, p["proj_out.weight"][:, :, None], p["proj_out.bias"]).reshape(n.shape)


def published_block(p: Weights, x: Tensor, embedding: Tensor, c: Tensor, seed: int) -> Tensor:
    """The hybrid block of the published HAEUNetModelV2Conservative, token by token, head by head."""
    r = res_block(below(p, "cnn_block."), x, embedding, c)
    t = below(p, "transformer_block.")
    height, width = r.shape[2:]
    channels, maps = r.shape[1], []

    def norm(z: Tensor, name: str) -> Tensor:
        return F.layer_norm(z, (channels,), t[f"{name}.weight"], t[f"{name}.bias"])

    for i, size in enumerate((1, 4, 8)):
        rows, columns = math.ceil(height / size), math.ceil(width / size)
        cells = [
            r[:, :, size * a : size * (a + 1), size * b : size * (b + 1)].sum((2, 3)) / size**2  # zeros fill it up
            for a in range(rows)
            for b in range(columns)
        ]
        z = torch.stack(cells, dim=1)  # (B, S, C)
        hidden = torch.zeros(len(cells), len(cells), dtype=torch.bool)
        if len(cells) > 64:
            hidden = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
            hidden |= torch.eye(len(cells), dtype=torch.bool)
        a = below(t, f"attentions.{i}.")
        q, k, v = F.linear(norm(z, "norm1"), a["in_proj_weight"], a["in_proj_bias"]).chunk(3, dim=2)
        answers = []
        for head in zip(q.chunk(8, 2), k.chunk(8, 2), v.chunk(8, 2), strict=True):
            scores = head[0] @ head[1].transpose(1, 2) / math.sqrt(channels / 8)
            answers.append(scores.masked_fill(hidden, -math.inf).softmax(2) @ head[2])
        z = z + F.linear(torch.cat(answers, dim=2), a["out_proj.weight"], a["out_proj.bias"])
        wide = F.linear(norm(z, "norm2"), t["mlp.mlp.0.weight"], t["mlp.mlp.0.bias"])
        z = z + F.linear(F.gelu(wide), t["mlp.mlp.3.weight"], t["mlp.mlp.3.bias"])
        coarse = z.transpose(1, 2).reshape(len(z), channels, rows, columns)
        maps.append(F.interpolate(coarse, (height, width), mode="bilinear"))
    joined = torch.cat(maps, dim=1).permute(0, 2, 3, 1)
    both = torch.cat([r, F.linear(joined, t["scale_fusion.weight"], t["scale_fusion.bias"]).permute(0, 3, 1, 2)], dim=1)
    fused = F.conv2d(both, p["fusion.0.weight"], p["fusion.0.bias"])
    return silu(group_norm(fused, p["fusion.1.weight"], p["fusion.1.bias"], groups=8))


def self_attention(p: Weights, x: Tensor, heads: int, c: Tensor | None = None) -> Tensor:
    """x + proj(attention(GN(x))) over all positions and, where it is given, one token of the condition c (B, E)."""
    h = group_norm(x, p["norm.weight"], p["norm.bias"]).flatten(2)
    answers = []
    for head, rows in enumerate(F.conv1d(h, p["qkv.weight"], p["qkv.bias"]).chunk(heads, dim=1)):
        q, k, v = rows.chunk(3, dim=1)
        if c is not None:
            token = F.conv1d(c[:, :, None], p["encoder_kv.weight"], p["encoder_kv.bias"]).chunk(heads, dim=1)[head]
            of_key, of_value = token.chunk(2, dim=1)
            k, v = torch.cat([k, of_key], dim=2), torch.cat([v, of_value], dim=2)
        answers.append(attention(q, k, v))
    return x + F.conv1d(torch.cat(answers, dim=1), p["proj_out.weight"], p["proj_out.bias"]).reshape(x.shape)


def number_of_heads(config: dict[str, Any], channels: int) -> int:
    width = config.get("num_head_channels")
    return config["num_heads"] if width is None else channels // width


def visible(config: dict[str, Any], height: int, width: int) -> Tensor:
    """The sparse pattern as a mask (L, S), True where a position sees a token."""
    grid = Grid(height, width, PATCHES)
    names = ("sparsity", "max_keys", "pattern_seed")
    pattern = make_pattern(config["attention_pattern"], grid, *(config[name] for name in names))
    return torch.from_numpy(pattern.visible())
