"""The text-conditional U-Net of small latents: constant resolution, FiLM in every residual block."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers' pipelines look for it here
from torch import nn

from heterodiff.errors import ConfigError
from heterodiff.models.backbone import Backbone
from heterodiff.models.blocks import AttentionBlock, FusedSequential, ResBlock, conv3x3, zero_
from heterodiff.models.defaults import FILM_CHANNEL_MULT, LAYERS_PER_BLOCK, MODEL_CHANNELS, NORM_GROUPS, NUM_HEADS
from heterodiff.models.normalization import GroupNorm32, set_norm_groups
from heterodiff.models.unet import Stage

DERIVED = ("in_channels", "sample_size", "num_classes")
"""Entries of the config that pipelines read, but that are no arguments of the constructor."""


class FiLMUNet(Backbone):
    """Denoiser ``film-unet``: a U-Net without resampling, with FiLM in all residual blocks.

    The maps keep their size, since small latents (7x7) have no resolution to lose. Encoder: convolution, then
    ``layers_per_block`` residual blocks a level; middle: block, self-attention, block; decoder: a residual block for
    each map of the encoder, on its concatenation with that map. In each, with the embedding e = time + text,

        (scale, shift) = Linear(SiLU(e)),   h = GN(h) (1 + scale) + shift   before the second convolution.

    FiLM acts alike at all positions; spatial information can enter as ``guess_channels`` beside the latents, such as a
    prior map predicted from the text. The text's part of e is exactly zero in rows without a condition.

    Args:
        latent_channels: channels of the latents.
        latent_size: intended height and width (or one number), also ``config.sample_size``; other sizes run too.
        condition_dim: width of the condition vector, for example a text embedding; None for none.
        guess_channels: channels of the prior that follows the latents in the input, such as a text's prior over the
            map. Together they are ``config.in_channels``. Saved configurations have this name.
        out_channels: twice latent_channels with a learned variance; default: latent_channels.
        model_channels: channels of the first convolution; the embedding has four times as many.
        channel_mult: level i has model_channels * channel_mult[i] channels.
        layers_per_block: residual blocks a level of the encoder.
        num_heads: heads of the self-attention.
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
        guess_channels: int = 0,
        out_channels: int | None = None,
        model_channels: int = MODEL_CHANNELS,
        channel_mult: Sequence[int | float] = FILM_CHANNEL_MULT,
        layers_per_block: int = LAYERS_PER_BLOCK,
        num_heads: int = NUM_HEADS,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        norm_groups: int = NORM_GROUPS,
    ):
        super().__init__()
        self.register_to_config(in_channels=latent_channels + guess_channels, sample_size=latent_size, num_classes=None)
        self.gradient_checkpointing = use_checkpoint
        self._check_arguments()
        self._build(self._make_embeddings())
        set_norm_groups(self, norm_groups)
        self._finish()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Arguments of the constructor, see diffusers' ``ConfigMixin.extract_init_dict``."""
        given = {name: value for name, value in config_dict.items() if name not in DERIVED}
        return super().extract_init_dict(given, **kwargs)

    def _check_arguments(self) -> None:
        c = self.config
        self._check_widths(c.model_channels)
        if c.guess_channels < 0:
            raise ConfigError(f"guess_channels: expected at least 0, found {c.guess_channels}")
        sizes = (c.latent_size,) if isinstance(c.latent_size, int) else c.latent_size
        if min(c.latent_channels, c.layers_per_block, c.out_channels or 1, *sizes) < 1:
            raise ConfigError(
                "latent_channels, latent_size, out_channels and layers_per_block: expected at least 1, found "
                f"{c.latent_channels}, {c.latent_size}, {c.out_channels} and {c.layers_per_block}"
            )
        width = self._widths()[-1]
        if c.num_heads < 1 or width % c.num_heads:
            raise ConfigError(f"attention heads: {width} channels do not split into {c.num_heads} heads (num_heads)")

    def _build(self, embedding_dim: int) -> None:
        c = self.config

        def res(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, embedding_dim, c.dropout, use_scale_shift_norm=True)

        layers = [width for width in self._widths() for _ in range(c.layers_per_block)]
        first, last = layers[0], layers[-1]
        skips, outputs = [c.model_channels, *layers], [*reversed(layers), first]
        self.input_blocks = nn.ModuleList([Stage(conv3x3(c.in_channels, c.model_channels))])
        self.input_blocks.extend(Stage(res(before, after)) for before, after in pairwise(skips))
        attention = AttentionBlock(last, c.num_heads, condition_dim=None)
        self.middle_block = Stage(res(last, last), attention, res(last, last))
        self.output_blocks = nn.ModuleList(
            Stage(res(before + skip, after))
            for before, skip, after in zip([last, *outputs[:-1]], reversed(skips), outputs, strict=True)
        )
        self.out = FusedSequential(
            GroupNorm32(first), nn.SiLU(), zero_(conv3x3(first, c.out_channels or c.latent_channels))
        )
