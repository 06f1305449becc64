"""Heterogeneous decoder block: a convolution branch beside a sparse multi-scale Transformer branch."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterodiff.models.attention.patterns import Grid, make_pattern
from heterodiff.models.attention.ways import DevicePattern, choose_way, sparse_attention
from heterodiff.models.blocks import Dropout, FusedSequential, conv3x3, embedding_layers, to_map, to_tokens
from heterodiff.models.normalization import GroupNorm32
from heterodiff.models.variants import HybridSpec

REGIONAL_PATCHES = (4, 8)
NUM_HEADS = 8
SCALES, SCALE_GROUPS = (1, 4, 8), 8
"""Patch sizes of the block of the published network, and groups of its norm."""
UNMASKED, HIDDEN_SHARE = 64, 0.2
"""Longest sequence without a mask there, and the share of pairs that a mask hides besides the diagonal."""


@dataclass(frozen=True)
class PatternSpec:
    """Arguments of :func:`heterodiff.models.attention.patterns.make_pattern` for one model."""

    kind: str
    sparsity: float
    max_keys: int
    seed: int


class SparseSelfAttention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention`` and a sparse key pattern."""

    def __init__(self, channels: int, num_heads: int, pattern: PatternSpec):
        super().__init__()
        self.num_heads = num_heads
        self.pattern = pattern
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.given_masks: dict[int, Tensor] = {}
        self.given_way: str | None = None
        self._placed: dict[tuple[int, int, torch.device], DevicePattern] = {}

    def device_pattern(self, height: int, width: int, device: torch.device) -> DevicePattern:
        """Pattern of a (height, width) map on ``device``; a given mask for its length takes precedence."""
        if torch.compiler.is_compiling():
            self._place_while_compiling(height, width, device)
        else:
            self._place(height, width, device)
        return self._placed[height, width, device]

    def _place(self, height: int, width: int, device: torch.device) -> None:
        if (height, width, device) in self._placed:
            return
        grid = Grid(height, width, REGIONAL_PATCHES)
        if grid.length in self.given_masks:
            visible = ~self.given_masks[grid.length][: grid.local]
            placed = DevicePattern("dense", visible.to(device))
        else:
            p = self.pattern
            pattern = make_pattern(p.kind, grid, p.sparsity, p.max_keys, p.seed)
            head_width = self.out_proj.in_features // self.num_heads
            way = self.given_way or choose_way(device.type, grid.length, head_width)
            with torch.inference_mode(False):  # else a pattern first met in sampling could not serve training
                placed = DevicePattern.place(pattern, device, way)
        self._placed[height, width, device] = placed

    @torch.compiler.assume_constant_result
    def _place_while_compiling(self, height: int, width: int, device: torch.device) -> None:
        """Place the pattern once, while the graph is traced, which then reads it like parameters."""
        self._place(height, width, device)

    def set_mask(self, mask: Tensor) -> None:
        """Use ``mask`` (S, S), True = hidden, whenever the sequence has S tokens."""
        self.given_masks[mask.shape[0]] = mask
        self._placed.clear()

    def use_way(self, way: str | None) -> None:
        """Compute attention by ``way`` (see ``attention/ways.py``); None: as its table says."""
        self.given_way = way
        self._placed.clear()

    def forward(self, local: Tensor, regional: Tensor, height: int, width: int) -> Tensor:
        """Queries from local (B, L = height * width, C), keys from local and regional (B, R, C) -> (B, L, C)."""
        channels = local.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split([channels, 2 * channels])
        q_bias, kv_bias = self.in_proj_bias.split([channels, 2 * channels])
        q = F.linear(local, q_weight, q_bias)
        kv = F.linear(torch.cat([local, regional], dim=1), kv_weight, kv_bias)
        pattern = self.device_pattern(height, width, local.device)
        return self.out_proj(sparse_attention(q, kv, pattern, self.num_heads))


class MaskedSelfAttention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention`` under a mask that is drawn once.

    Args:
        seed: of the mask.
    """

    def __init__(self, channels: int, num_heads: int, seed: int):
        super().__init__()
        self.num_heads, self.seed = num_heads, seed
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.given_masks: dict[int, Tensor] = {}
        self._placed: dict[tuple[int, torch.device], Tensor] = {}

    def visible(self, length: int, device: torch.device) -> Tensor | None:
        """Bool (S, S) of the keys that each query sees; None where it sees all."""
        if length <= UNMASKED and length not in self.given_masks:
            return None
        if torch.compiler.is_compiling():
            self._place_while_compiling(length, device)
        else:
            self._place(length, device)
        return self._placed[length, device]

    def _place(self, length: int, device: torch.device) -> None:
        if (length, device) in self._placed:
            return
        hidden = self.given_masks.get(length)
        if hidden is None:
            generator = torch.Generator().manual_seed(self.seed)
            hidden = torch.rand(length, length, generator=generator) < HIDDEN_SHARE
            hidden.fill_diagonal_(True)
        with torch.inference_mode(False):  # else a mask first met in sampling could not serve training
            self._placed[length, device] = (~hidden).to(device)

    @torch.compiler.assume_constant_result
    def _place_while_compiling(self, length: int, device: torch.device) -> None:
        self._place(length, device)

    def set_mask(self, mask: Tensor) -> None:
        """Use ``mask`` (S, S), True = hidden, whenever the sequence has S tokens."""
        self.given_masks[mask.shape[0]] = mask
        self._placed.clear()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S, C) -> (B, S, C)."""
        qkv = F.linear(tokens, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mask = self.visible(tokens.shape[1], tokens.device)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def make_mlp(channels: int, spec: HybridSpec, bottleneck_ratio: float, dropout: float) -> nn.Sequential:
    """Two layers with GELU, named ``mlp`` inside where they are a bottleneck, as in earlier checkpoints."""
    hidden = max(1, int(channels * bottleneck_ratio)) if spec.bottleneck_mlp else 4 * channels
    layers = nn.Sequential(
        nn.Linear(channels, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, channels), Dropout(dropout)
    )
    return nn.Sequential(OrderedDict(mlp=layers)) if spec.bottleneck_mlp else layers


def _replicate(x: Tensor, dim: int, count: int) -> Tensor:
    """Repeat the last row or column of ``x`` ``count`` times; F.pad copies even when there is nothing to add."""
    return torch.cat([x, x.narrow(dim, -1, 1).repeat_interleave(count, dim)], dim) if count else x


class MultiScaleTransformer(nn.Module):
    """MSTB: h + A + MLP(LN(A)), A = sparse attention of local tokens over local and regional ones."""

    def __init__(self, channels: int, spec: HybridSpec, bottleneck_ratio: float, dropout: float, pattern: PatternSpec):
        super().__init__()
        self.local_norm = nn.LayerNorm(channels)
        self.regional_norms = nn.ModuleList(nn.LayerNorm(channels) for _ in REGIONAL_PATCHES)
        self.patch_projections = self.shared_patch_embed = None
        if spec.linear_patches:
            self.patch_projections = nn.ModuleList(nn.Linear(channels * p * p, channels) for p in REGIONAL_PATCHES)
        else:
            self.shared_patch_embed = nn.Conv2d(channels, channels, 1)
        self.multihead_attn = SparseSelfAttention(channels, NUM_HEADS, pattern)
        self.norm_out = nn.LayerNorm(channels)
        self.mlp = make_mlp(channels, spec, bottleneck_ratio, dropout)

    def _regional_tokens(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, R, C): one token for each patch, patch size by patch size."""
        tokens = []
        for i, p in enumerate(REGIONAL_PATCHES):
            height, width = x.shape[2:]
            padded = _replicate(_replicate(x, 2, -height % p), 3, -width % p)
            if self.patch_projections is None:
                token = to_tokens(F.avg_pool2d(padded, p))
            else:
                patches = F.unfold(padded, p, stride=p).transpose(1, 2)  # (B, R, C p p), channel-major
                token = self.patch_projections[i](patches)
            tokens.append(self.regional_norms[i](token))
        return torch.cat(tokens, dim=1)

    def forward(self, h: Tensor) -> Tensor:
        """h (B, C, H, W) -> (B, C, H, W)."""
        height, width = h.shape[2:]
        embedded = h if self.shared_patch_embed is None else self.shared_patch_embed(h)
        local = self.local_norm(to_tokens(embedded))
        a = self.multihead_attn(local, self._regional_tokens(embedded), height, width)
        return to_map((self.mlp(self.norm_out(a)) + a).add_(to_tokens(h)), height, width)


class HybridBlock(nn.Module):
    """x + fuse(conv branch, transformer branch), both on x plus the block embedding."""

    def __init__(
        self,
        channels: int,
        embedding_dim: int,
        spec: HybridSpec,
        bottleneck_ratio: float,
        dropout: float,
        pattern: PatternSpec,
    ):
        super().__init__()
        self.concat_fusion = spec.concat_fusion
        layers = [(GroupNorm32(channels), nn.SiLU(), conv3x3(channels, channels)) for _ in range(2)]
        self.conv_branch = FusedSequential(*chain.from_iterable(layers))
        self.transformer_branch = MultiScaleTransformer(channels, spec, bottleneck_ratio, dropout, pattern)
        self.emb_layers = embedding_layers(embedding_dim, channels)
        self.fusion_conv = nn.Conv2d(2 * channels if spec.concat_fusion else channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), SiLU of the embedding (B, E) -> (B, C, H, W)."""
        h = x + self.emb_layers(embedding)[:, :, None, None]
        a, b = self.conv_branch(h), self.transformer_branch(h)
        fused = torch.cat([a, b], dim=1) if self.concat_fusion else a.add_(b).mul_(0.5)
        return self.fusion_conv(fused).add_(x)


class ScaleTransformer(nn.Module):
    """MSTB of the published network: at each scale z + A(LN(z)), then z + MLP(LN(z)); a linear layer joins the maps.

    Tokens of a scale are means of patches, of which zeros fill up the last ones; coarse maps are brought back by
    bilinear interpolation.
    """

    def __init__(self, channels: int, spec: HybridSpec, bottleneck_ratio: float, dropout: float, seed: int):
        super().__init__()
        self.attentions = nn.ModuleList(MaskedSelfAttention(channels, NUM_HEADS, seed) for _ in SCALES)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp = make_mlp(channels, spec, bottleneck_ratio, dropout)
        self.scale_fusion = nn.Linear(len(SCALES) * channels, channels)

    def forward(self, r: Tensor) -> Tensor:
        """r (B, C, H, W) -> (B, C, H, W)."""
        height, width = r.shape[2:]
        scales = []
        for p, attention in zip(SCALES, self.attentions, strict=True):
            coarse = r if p == 1 else F.avg_pool2d(F.pad(r, (0, -width % p, 0, -height % p)), p)
            z = to_tokens(coarse)
            z = z + attention(self.norm1(z))
            z = z + self.mlp(self.norm2(z))
            if p > 1:
                coarse = to_map(z, *coarse.shape[2:])
                z = to_tokens(F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False))
            scales.append(z)
        return to_map(self.scale_fusion(torch.cat(scales, dim=-1)), height, width)


class ScaleHybridBlock(nn.Module):
    """Hybrid block of the published network: a residual block, then the Transformer on its result, then both fused."""

    def __init__(
        self,
        cnn_block: nn.Module,
        channels: int,
        spec: HybridSpec,
        bottleneck_ratio: float,
        dropout: float,
        seed: int,
    ):
        super().__init__()
        self.cnn_block = cnn_block
        self.transformer_block = ScaleTransformer(channels, spec, bottleneck_ratio, dropout, seed)
        self.fusion = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1), nn.GroupNorm(SCALE_GROUPS, channels), nn.SiLU()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), SiLU of the embedding (B, E) -> (B, C, H, W)."""
        r = self.cnn_block(x, embedding)
        return self.fusion(torch.cat([r, self.transformer_block(r)], dim=1))
