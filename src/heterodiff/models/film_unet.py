"""The text-conditional U-Net of small latents: constant resolution, FiLM in every residual block."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers' pipelines look for it here
from torch import Tensor, nn
from torch.nn import functional as F

from heterodiff.errors import ConfigError
from heterodiff.models.blocks import AttentionBlock, FusedSequential, ResBlock, conv3x3, zero_
from heterodiff.models.denoiser import Denoiser, check_widths
from heterodiff.models.normalization import GroupNorm32
from heterodiff.models.unet import Stage

DERIVED = ("in_channels", "sample_size", "num_classes")
"""Names under which pipelines look for what the constructor calls otherwise or does not have."""


class FiLMUNet(Denoiser):
    """Denoiser ``film-unet``: a U-Net without resampling, whose residual blocks are all scaled and shifted by FiLM.

    The maps keep their size: a latent of 7x7 has none to give away. Encoder: convolution, then ``layers_per_block``
    residual blocks a level; middle: block, self-attention, block; decoder: a residual block for each map of the
    encoder, on its concatenation with that map. In each, with the embedding e = time + text,

        (scale, shift) = Linear(SiLU(e)),   h = GN(h) (1 + scale) + shift   before the second convolution.

    FiLM is alike at all places. What is to be where comes with a linear map of the text, ``condition_channels`` at
    every place, which the first convolution sees beside the latents. The text's part of e and this map are exactly zero
    in rows without a condition.

    Args:
        latent_channels: of the latents; also found as ``config.in_channels``.
        latent_size: height and width (or one number) it is meant for; at all others, which run too, the map of the text
            is interpolated. Also ``config.sample_size``.
        condition_dim: width of the condition vector, for example a text embedding; None for none.
        condition_channels: of the map of the condition; 0 for none.
        out_channels: twice latent_channels with a learned variance; default: latent_channels.
        model_channels: of the first convolution; the embedding has four times as many.
        channel_mult: level i has model_channels * channel_mult[i] channels.
        layers_per_block: residual blocks a level of the encoder.
        num_heads: of the self-attention.
        dropout: probability before the last convolution of each residual block.
        use_checkpoint: recompute every block in the backward pass (less memory, more time).

    Raises:
        ConfigError: an argument that no network can be built from.

    Source: Perez et al. 2018 (FiLM); Dhariwal & Nichol 2021 (ADM) for the blocks.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 256,
        latent_size: int | tuple[int, int] = 7,
        condition_dim: int | None = 512,
        condition_channels: int = 16,
        out_channels: int | None = None,
        model_channels: int = 128,
        channel_mult: Sequence[int | float] = (1, 2, 4),
        layers_per_block: int = 2,
        num_heads: int = 8,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.register_to_config(**dict(zip(DERIVED, (latent_channels, latent_size, None), strict=True)))
        self.gradient_checkpointing = use_checkpoint
        self._check_arguments()
        self._build(self._make_embeddings())
        self._finish()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As diffusers' ``ConfigMixin.extract_init_dict``."""
        given = {name: value for name, value in config_dict.items() if name not in DERIVED}
        return super().extract_init_dict(given, **kwargs)

    def _widths(self) -> list[int]:
        return [int(self.config.model_channels * mult) for mult in self.config.channel_mult]

    def _latent_size(self) -> tuple[int, int]:
        size = self.config.latent_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def _check_arguments(self) -> None:
        c = self.config
        check_widths([c.model_channels, *self._widths()] if c.channel_mult else [], c.model_channels)
        if c.condition_channels < 0:
            raise ConfigError(f"condition_channels: expected at least 0, found {c.condition_channels}")
        sizes = self._latent_size()
        if min(c.latent_channels, c.layers_per_block, c.out_channels or 1, *sizes) < 1:
            raise ConfigError(
                "latent_channels, latent_size, out_channels and layers_per_block: expected at least 1, found "
                f"{c.latent_channels}, {c.latent_size}, {c.out_channels} and {c.layers_per_block}"
            )
        if c.num_heads < 1 or self._widths()[-1] % c.num_heads:
            raise ConfigError(
                f"attention heads: {self._widths()[-1]} channels do not split into {c.num_heads} heads (num_heads)"
            )

    def _build(self, embedding_dim: int) -> None:
        c = self.config

        def res(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, embedding_dim, c.dropout, use_scale_shift_norm=True)

        channels, seen = c.model_channels, c.latent_channels
        if c.condition_dim is not None and c.condition_channels:
            self.condition_map = nn.Linear(
                c.condition_dim, c.condition_channels * math.prod(self._latent_size()), bias=False
            )
            seen += c.condition_channels
        self.input_blocks = nn.ModuleList([Stage(conv3x3(seen, channels))])
        skips = [channels]
        layers = [width for width in self._widths() for _ in range(c.layers_per_block)]
        for width in layers:
            self.input_blocks.append(Stage(res(channels, width)))
            channels = width
            skips.append(channels)
        attention = AttentionBlock(channels, c.num_heads, condition_dim=None)
        self.middle_block = Stage(res(channels, channels), attention, res(channels, channels))
        self.output_blocks = nn.ModuleList()
        for width in [*reversed(layers), layers[0]]:
            self.output_blocks.append(Stage(res(channels + skips.pop(), width)))
            channels = width
        self.out = FusedSequential(
            GroupNorm32(channels), nn.SiLU(), zero_(conv3x3(channels, c.out_channels or c.latent_channels))
        )

    def _seen(self, sample: Tensor, condition: Tensor | None) -> Tensor:
        """The latents and beside them the map of the condition."""
        if not hasattr(self, "condition_map"):
            return sample
        channels, size = self.config.condition_channels, tuple(sample.shape[2:])
        if condition is None:
            placed = sample.new_zeros(len(sample), channels, *size)
        else:
            placed = self.condition_map(condition.to(self.dtype)).unflatten(1, (channels, *self._latent_size()))
            if size != self._latent_size():
                placed = F.interpolate(placed, size, mode="bilinear", align_corners=False)
        return torch.cat([sample.to(self.dtype), placed.to(self.dtype)], dim=1)
