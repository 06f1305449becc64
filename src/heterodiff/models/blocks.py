"""Building blocks of the ADM U-Net (Dhariwal & Nichol 2021), in channels-last layout.

Parameter names and shapes are those of guided-diffusion, so that its checkpoints load as they are.
Feature maps are (B, C, H, W) in ``torch.channels_last`` memory format, which makes the token view (B, H*W, C) free of
copies. Outputs of convolutions are added to in place: autograd does not need them, and one map less is written and
read. Outputs of linear layers are not: for tokens they are views, whose gradients autograd would copy.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heterodiff.models.conditioning import attend_with_condition
from heterodiff.models.normalization import GroupNorm32, norm_film, norm_silu


class Pointwise(nn.Conv1d):
    """1x1 convolution with guided-diffusion's (out, in, 1) weight, applied to tokens (B, T, in).

    Args:
        kernel_size, others, options: as of ``nn.Conv1d``, since peft makes layers of the same class beside this one.
    """

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any = 1, *others: Any, **options: Any):
        super().__init__(in_channels, out_channels, kernel_size, *others, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight.squeeze(-1), self.bias)


def zero_(module: nn.Module) -> nn.Module:
    """Set all parameters of ``module`` to zero, so that its residual branch adds nothing at the start."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


def make_activation(activation: str) -> nn.Module:
    """``silu``, or ``identity`` for earlier checkpoints whose norms ignored their activation."""
    return {"silu": nn.SiLU, "identity": nn.Identity}[activation]()


class Dropout(nn.Dropout):
    """Dropout that keeps its mask as one byte a value (on a CPU torch's own keeps four)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return torch.native_dropout(x, self.p, True)[0]


class FusedSequential(nn.Sequential):
    """Layers in turn, with each norm and SiLU fused (see :func:`norm_silu`)."""

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self)
        for layer in layers:
            if isinstance(layer, GroupNorm32):
                activation = next(layers)
                x = norm_silu(x, layer) if isinstance(activation, nn.SiLU) else activation(layer(x))
            else:
                x = layer(x)
        return x


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``function(*inputs)`` with only the inputs kept; the backward pass recomputes the rest.

    Recomputing stops as soon as the backward pass has all it needs, so a convolution at the end is not computed twice.
    """
    return checkpoint(function, *inputs, use_reentrant=False)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); a view when ``x`` is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H*W, C) -> channels-last (B, C, H, W); a view."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Sinusoids [cos, sin] of ``timestep`` (B,), frequencies exp(-ln(10000) i / half): (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angles = timestep.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if width % 2 else embedding


class Downsample(nn.Module):
    """Halve height and width: stride-2 3x3 convolution, or average pooling."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then an optional 3x3 convolution."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = conv3x3(channels, channels) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        # On smaller maps, making the kernel costs more than it saves.
        if self.conv is not None and x.device.type == "cpu" and height * width >= 4 * channels:
            return upsample_conv(x, self.conv.weight, self.conv.bias)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution, padding 1, of ``x`` doubled by nearest neighbour, as one transposed convolution of ``x``.

    Doubling is a transposed convolution with a 2x2 kernel of ones, so both together are one with their 4x4 product:
    each output pixel reads 2x2 pixels instead of 3x3 with copies among them, 4/9 of the operations, and the doubled map
    is never formed. x (B, C, H, W), weight (O, C, 3, 3), bias (O,) or None -> (B, O, 2H, 2W).
    """
    rows = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    kernel = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))
    return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)


def embedding_layers(embedding_dim: int, out_features: int) -> nn.Sequential:
    """Linear layer on SiLU(embedding), which is computed once for all blocks; named as in guided-diffusion."""
    return nn.Sequential(nn.Identity(), nn.Linear(embedding_dim, out_features))


class ResBlock(nn.Module):
    """Residual block conditioned on the embedding, by addition or by scale and shift (FiLM).

    Args:
        in_channels, out_channels: channels of the feature maps.
        embedding_dim: width E of the block embedding.
        dropout: probability before the last convolution.
        use_scale_shift_norm: GN(h) (1 + scale) + shift instead of adding the embedding before the norm.
        activation: ``silu`` or ``identity`` (see :func:`make_activation`).
        resample: ``"up"``, ``"down"`` or None; resampling inside the block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        dropout: float,
        use_scale_shift_norm: bool = False,
        activation: str = "silu",
        resample: str | None = None,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = FusedSequential(
            GroupNorm32(in_channels), make_activation(activation), conv3x3(in_channels, out_channels)
        )
        sampler = {"up": Upsample, "down": Downsample, None: None}[resample]
        self.resample = None if sampler is None else sampler(in_channels, use_conv=False)
        self.emb_layers = embedding_layers(embedding_dim, 2 * out_channels if use_scale_shift_norm else out_channels)
        self.out_layers = FusedSequential(
            GroupNorm32(out_channels),
            nn.SiLU() if use_scale_shift_norm else make_activation(activation),
            Dropout(dropout),
            zero_(conv3x3(out_channels, out_channels)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def _resampled(self, x: Tensor) -> Tensor:
        assert self.resample is not None
        return self.in_layers[2](self.resample(self.in_layers[:2](x)))

    def _scaled_and_shifted(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = e.chunk(2, dim=1)
        return self.out_layers[2:](norm_film(h, cast(GroupNorm32, self.out_layers[0]), scale, shift, silu=True))

    def forward(self, x: Tensor, embedding: Tensor, recompute: bool = False) -> Tensor:
        """x (B, C_in, H, W), SiLU of the embedding (B, E) -> (B, C_out, H', W').

        Args:
            recompute: recompute norms, activations and dropout in the backward pass instead of keeping the inputs of
                the convolutions.
        """
        run = recomputed if recompute else lambda layer, *inputs: layer(*inputs)
        h = run(self.in_layers if self.resample is None else self._resampled, x)
        if self.resample is not None:
            x = self.resample(x)
        e = self.emb_layers(embedding)[:, :, None, None]
        h = run(self._scaled_and_shifted, h, e) if self.use_scale_shift_norm else run(self.out_layers, h.add_(e))
        return h.add_(self.skip_connection(x))


class AttentionBlock(nn.Module):
    """x + proj(attention(GN(x))) over all positions and, with ``condition_dim``, over the condition tokens.

    The condition is E tokens, columns of c c^T, as in earlier checkpoints, or with ``one_token`` c itself. Rows without
    a condition see tokens of zeros; without ``tokens_of_none`` only in a batch where another row has one.

    Weight rows: ``qkv`` per head [q; k; v], ``encoder_kv`` per head [k; v] (guided-diffusion's legacy order).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        condition_dim: int | None,
        one_token: bool = False,
        tokens_of_none: bool = True,
    ):
        super().__init__()
        self.num_heads, self.one_token, self.tokens_of_none = num_heads, one_token, tokens_of_none
        self.norm = GroupNorm32(channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.encoder_kv = None if condition_dim is None else Pointwise(condition_dim, 2 * channels)
        self.proj_out = zero_(Pointwise(channels, channels))

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x (B, C, H, W), condition (B, E) or None (no row has one) -> (B, C, H, W)."""
        height, width = x.shape[2:]
        qkv = self.qkv(to_tokens(self.norm(x))).unflatten(-1, (self.num_heads, 3, -1))
        q, kv = qkv.split([1, 2], dim=3)  # (B, T, heads, 1 or 2, d)
        q = q.squeeze(3)
        if self.encoder_kv is None or (condition is None and not self.tokens_of_none):
            k, v = kv.transpose(1, 2).unbind(3)
            a = F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
        elif self.one_token:
            bias = self.encoder_kv.bias.expand(len(x), 1, -1)
            token = bias if condition is None else self.encoder_kv(condition[:, None])
            token = token.to(kv.dtype).unflatten(-1, (self.num_heads, 2, -1))
            k, v = torch.cat([kv, token], dim=1).transpose(1, 2).unbind(3)
            a = F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
        else:
            weight = self.encoder_kv.weight.squeeze(-1)
            shown = None if self.tokens_of_none else condition.ne(0).any()  # type: ignore[union-attr]
            a = attend_with_condition(q, kv, condition, weight, self.encoder_kv.bias, shown=shown)
        return to_map(self.proj_out(a.flatten(2)) + to_tokens(x), height, width)
