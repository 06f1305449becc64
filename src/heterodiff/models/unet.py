"""The conditional U-Net of the HAE family: ADM encoder and, per variant, a hybrid CNN-Transformer decoder."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers' pipelines look for it here
from torch import Tensor, nn

from heterodiff.errors import ConfigError, unknown_name
from heterodiff.models.attention.patterns import MIN_KEYS, PATTERNS
from heterodiff.models.backbone import Backbone, Recompute
from heterodiff.models.blocks import (
    AttentionBlock,
    Downsample,
    FusedSequential,
    ResBlock,
    Upsample,
    conv3x3,
    make_activation,
    recomputed,
    zero_,
)
from heterodiff.models.defaults import (
    ATTENTION_SIDE,
    LAYERS_PER_BLOCK,
    MODEL_CHANNELS,
    NORM_GROUPS,
    NUM_HEADS,
    SPARSITY,
    check_size,
    default_levels,
)
from heterodiff.models.hybrid import (
    HybridBlock,
    MaskedSelfAttention,
    PatternSpec,
    ScaleHybridBlock,
    SparseSelfAttention,
)
from heterodiff.models.normalization import GroupNorm32, set_norm_groups
from heterodiff.models.pooled import PooledResBlock
from heterodiff.models.variants import VARIANTS, HybridSpec

CONDITION_TOKENS = ("full", "one", "none")
DEFAULTS: dict[str, Any] = {
    "num_heads": NUM_HEADS,
    "num_head_channels": None,
    "use_scale_shift_norm": False,
    "condition_tokens": "full",
    "mid_attention": True,
    "norm_groups": NORM_GROUPS,
    "memory_optimization": False,
    "attention_resolutions": None,
    "attention_side": ATTENTION_SIDE,
}
"""Arguments where they are None and the variant has no default of its own."""


class Stage(nn.ModuleList):
    """Layers applied in turn; residual and hybrid blocks get the embedding, attention blocks the condition."""

    def __init__(self, *layers: nn.Module):
        super().__init__(layers)

    def forward(self, x: Tensor, embedding: Tensor, condition: Tensor | None, recompute: Recompute) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                inputs = (embedding, condition) if isinstance(layer, PooledResBlock) else (embedding,)
                if recompute == "all":
                    x = recomputed(layer, x, *inputs)
                else:
                    x = layer(x, *inputs, recompute=recompute == "cheap")
            elif isinstance(layer, HybridBlock | ScaleHybridBlock | AttentionBlock):
                argument = condition if isinstance(layer, AttentionBlock) else embedding
                x = layer(x, argument) if recompute == "nothing" else recomputed(layer, x, argument)
            else:
                x = layer(x)
        return x


class HAEUNet(Backbone):
    """U-Net denoiser with a class or vector condition; with a hybrid CNN-Transformer decoder in the HAE variants.

    Args:
        sample_size: intended height and width (or one number); other sizes divisible by the network's factor
            patch_size * 2^(levels - 1) run too.
        in_channels, out_channels: channels of the images; out_channels is twice in_channels with a learned variance.
        variant: one of ``VARIANTS``.
        model_channels: base width mc; level i has mc * channel_mult[i] channels.
        layers_per_block: residual blocks a level (the decoder has one more).
        attention_resolutions: downsampling factors at which attention follows each residual block; default: those
            with maps of at most 16 positions a side.
        dropout: probability in residual blocks and Transformer MLPs.
        channel_mult: width factor of each level; fractions such as 0.5 are allowed; default: by sample_size, see
            :func:`heterodiff.models.defaults.default_levels`.
        num_classes: class labels are 0 .. num_classes - 1, and -1 for none; None for an unconditional network.
        num_heads, num_heads_upsample: attention heads, and those in the decoder if they differ.
        num_head_channels: width of a head, in place of their number.
        use_scale_shift_norm: condition residual blocks by scale and shift (FiLM).
        resblock_updown: resample inside residual blocks.
        conv_resample: resample with a convolution.
        dims: spatial dimensions; only 2.
        use_checkpoint: recompute every block in the backward pass (less memory, more time).
        use_hae: False removes the hybrid blocks (the plain ``unet``).
        bottleneck_ratio: hidden width of the bottleneck MLP, relative.
        memory_optimization: recompute the activations that take the most memory; default: as the variant.
        zero_threshold: with memory_optimization, an embedding row whose largest absolute value is at most this
            counts as no condition.
        activation: ``identity`` for earlier checkpoints whose norms ignored their activation.
        class_embedding: ``mlp``, or ``direct``: one embedding table of the block embedding's width.
        condition_tokens: keys that stand for the condition in attention: ``full`` (True): E tokens, as in earlier
            checkpoints; ``one`` token; ``none`` (False).
        attention_pattern, sparsity, max_keys, pattern_seed: sparse attention of the hybrid blocks, see
            :func:`heterodiff.models.attention.patterns.make_pattern`.
        condition_dim: width of a condition vector, for example a text embedding, in place of the class; None for none.
        mid_attention: attention between the residual blocks of the coarsest level.
        norm_groups: groups of the norms, a divisor of 32; default: as the variant.
        attributes: number of classes of each further condition, 0 for one that is a number; None for none.
        patch_size: patch side in pixels; each patch becomes the channels of one position, so that everything between
            the first and the last convolution costs patch_size^2 times less.

    Raises:
        ConfigError: an argument that no network can be built from.

    Source: Dhariwal & Nichol 2021 (ADM) for the U-Net; Hoogeboom et al. 2023 (simple diffusion) for patches.
    """

    has_decoder = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        out_channels: int | None = None,
        variant: str = "unet",
        model_channels: int = MODEL_CHANNELS,
        layers_per_block: int = LAYERS_PER_BLOCK,
        attention_resolutions: Sequence[int] | None = None,
        dropout: float = 0.0,
        channel_mult: Sequence[int | float] | None = None,
        num_classes: int | None = None,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        num_heads_upsample: int | None = None,
        use_scale_shift_norm: bool | None = None,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_hae: bool = True,
        bottleneck_ratio: float = 0.25,
        memory_optimization: bool | None = None,
        zero_threshold: float = 1e-6,
        activation: str = "silu",
        class_embedding: str = "mlp",
        condition_tokens: str | bool | None = None,
        attention_pattern: str = "multiscale",
        sparsity: float = SPARSITY,
        max_keys: int = 512,
        pattern_seed: int = 0,
        condition_dim: int | None = None,
        patch_size: int = 1,
        mid_attention: bool | None = None,
        norm_groups: int | None = None,
        attributes: Sequence[int] | None = None,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ConfigError(unknown_name("model variant", variant, VARIANTS))
        self._fill_in_defaults(VARIANTS[variant].defaults)
        self._check_arguments()
        self.memory_optimization = self.config.memory_optimization
        self.zero_threshold = zero_threshold
        self.gradient_checkpointing = use_checkpoint
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(self.config.channel_mult) - 1)
        self._make_layers()
        self._finish()

    def _make_layers(self) -> None:
        self._build(self._make_embeddings())
        set_norm_groups(self, self.config.norm_groups)

    def _become(self, variant: str) -> None:
        """Replace all layers by fresh ones of another variant with the same arguments."""
        device, dtype = self.device, self.dtype
        self.register_to_config(variant=variant)
        self._make_layers()
        self.to(device, dtype)
        self._lay_out_weights()

    def _fill_in_defaults(self, of_variant: Mapping[str, Any]) -> None:
        """Put defaults in the place of arguments that are None."""
        c = self.config
        defaults = {**DEFAULTS, **of_variant}
        if c.num_heads is not None or c.num_head_channels is not None:
            defaults |= {"num_heads": NUM_HEADS, "num_head_channels": None}
        attention, side = defaults.pop("attention_resolutions"), defaults.pop("attention_side")
        attention = attention if c.attention_resolutions is None else c.attention_resolutions
        levels = default_levels(c.sample_size, c.patch_size, c.channel_mult, attention, side)
        found = {name: value if c[name] is None else c[name] for name, value in defaults.items()}
        if isinstance(found["condition_tokens"], bool):  # as in earlier configurations
            found["condition_tokens"] = "full" if found["condition_tokens"] else "none"
        self.register_to_config(**found, **dict(zip(("channel_mult", "attention_resolutions"), levels, strict=True)))

    def _check_arguments(self) -> None:
        c = self.config
        if c.condition_tokens not in CONDITION_TOKENS:
            raise ConfigError(unknown_name("condition_tokens", c.condition_tokens, CONDITION_TOKENS))
        if c.attention_pattern not in PATTERNS:
            raise ConfigError(unknown_name("attention_pattern", c.attention_pattern, PATTERNS))
        if c.activation not in ("silu", "identity"):
            raise ConfigError(unknown_name("activation", c.activation, ("silu", "identity")))
        if c.class_embedding not in ("mlp", "direct"):
            raise ConfigError(unknown_name("class_embedding", c.class_embedding, ("mlp", "direct")))
        if not 0 <= c.sparsity < 1 or c.max_keys < MIN_KEYS:
            raise ConfigError(
                f"sparsity and max_keys: expected 0 <= sparsity < 1 and max_keys >= {MIN_KEYS}, "
                f"found {c.sparsity} and {c.max_keys}"
            )
        if c.patch_size < 1:
            raise ConfigError(f"patch_size: expected at least 1, found {c.patch_size}")
        if c.dims != 2:
            raise ConfigError(f"dims: expected 2 (images), found {c.dims}")
        if c.num_classes is not None and c.condition_dim is not None:
            raise ConfigError(
                f"num_classes={c.num_classes} and condition_dim={c.condition_dim}: a network takes one kind of "
                "condition; leave one of them out"
            )
        self._check_widths()
        widths = self._widths()
        attended = {w for level, w in enumerate(widths) if 2**level in c.attention_resolutions} | {widths[-1]}
        for width in sorted(attended):
            for heads in (c.num_heads, c.num_heads_upsample):
                heads = c.num_heads if heads is None else heads
                head = width // max(1, heads) if c.num_head_channels is None else c.num_head_channels
                if heads < 1 or head < 1 or width % head:
                    wanted = f"{heads} heads (num_heads)"
                    if c.num_head_channels is not None:
                        wanted = f"heads of {c.num_head_channels} channels (num_head_channels)"
                    raise ConfigError(f"attention heads: {width} channels do not split into {wanted}")
        if odd := [f for f in c.attention_resolutions if f < 1 or f & (f - 1)]:
            raise ConfigError(f"attention_resolutions: downsampling factors are powers of 2, found {odd}")

    def _build(self, embedding_dim: int) -> None:
        c = self.config
        pattern = PatternSpec(c.attention_pattern, c.sparsity, c.max_keys, c.pattern_seed)
        spec = VARIANTS[c.variant] if c.use_hae else VARIANTS["unet"]
        widths = self._widths()
        conditional = c.num_classes is not None or c.condition_dim is not None or bool(c.attributes)
        token_dim = embedding_dim if conditional and c.condition_tokens != "none" else None
        res = partial(
            ResBlock,
            embedding_dim=embedding_dim,
            dropout=c.dropout,
            use_scale_shift_norm=c.use_scale_shift_norm,
            activation=c.activation,
        )

        def attention(channels: int, heads: int) -> AttentionBlock:
            if c.num_head_channels is not None:
                heads = channels // c.num_head_channels
            return AttentionBlock(channels, heads, token_dim, c.condition_tokens == "one", spec.tokens_of_none)

        def layers(in_channels: int, level: int, heads: int, pooled: bool = False) -> list[nn.Module]:
            width = widths[level]
            block = (
                PooledResBlock(in_channels, width, embedding_dim, c.dropout, token_dim)
                if pooled
                else res(in_channels, width)
            )
            return [block, attention(width, heads)] if 2**level in c.attention_resolutions else [block]

        def hybrid(channels: int, of: HybridSpec) -> nn.Module:
            if of.by_scale:
                block = res(channels, channels)
                return ScaleHybridBlock(block, channels, of, c.bottleneck_ratio, c.dropout, c.pattern_seed)
            return HybridBlock(channels, embedding_dim, of, c.bottleneck_ratio, c.dropout, pattern)

        def resample(channels: int, direction: str) -> nn.Module:
            if c.resblock_updown:
                return res(channels, channels, resample=direction)
            return (Upsample if direction == "up" else Downsample)(channels, c.conv_resample)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage(conv3x3(c.in_channels * c.patch_size**2, channels))])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(c.layers_per_block):
                self.input_blocks.append(Stage(*layers(channels, level, c.num_heads)))
                channels = width
                skips.append(channels)
            if level != len(widths) - 1:
                self.input_blocks.append(Stage(resample(channels, "down")))
                skips.append(channels)
        # In the order in which they are applied: initial weights are drawn in the order of construction.
        middle = [res(channels, channels), *([attention(channels, c.num_heads)] if c.mid_attention else [])]
        self.middle_block = Stage(*middle, res(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))) if self.has_decoder else ():
            for i in range(c.layers_per_block + 1):
                before_up = level > 0 and i == c.layers_per_block
                stage = layers(
                    channels + skips.pop(), level, c.num_heads_upsample or c.num_heads, spec.pooled and before_up
                )
                channels = width
                if before_up:
                    if spec.hybrid is not None:
                        stage.append(hybrid(channels, spec.hybrid))
                    stage.append(resample(channels, "up"))
                self.output_blocks.append(Stage(*stage))
        self.out = self._make_out(channels)

    def _make_out(self, channels: int) -> nn.Module:
        """Layers after the last block, which has ``channels``."""
        c = self.config
        last = zero_(conv3x3(channels, (c.out_channels or c.in_channels) * c.patch_size**2))
        return FusedSequential(GroupNorm32(channels), make_activation(c.activation), last)

    def sparse_attentions(self) -> Iterator[SparseSelfAttention]:
        """Iterate over the sparse attention of each hybrid block."""
        return (m for m in self.modules() if isinstance(m, SparseSelfAttention))

    def _masked_attentions(self) -> Iterator[SparseSelfAttention | MaskedSelfAttention]:
        return (m for m in self.modules() if isinstance(m, SparseSelfAttention | MaskedSelfAttention))

    def set_attention_masks(self, masks: dict[int, Tensor]) -> None:
        """Use given masks instead of the pattern: ``{S: BoolTensor (S, S)}``, True = hidden, by sequence length.

        Raises:
            ConfigError: a mask that is not boolean of shape (S, S).
        """
        for length, mask in masks.items():
            if mask.dtype != torch.bool or mask.shape != (length, length):
                raise ConfigError(
                    f"attention mask for S={length}: expected bool ({length}, {length}), "
                    f"found {mask.dtype} {tuple(mask.shape)}"
                )
            for attention in self._masked_attentions():
                attention.set_mask(mask)

    def _check_sample(self, sample: Tensor) -> None:
        super()._check_sample(sample)
        check_size(sample.shape[2], sample.shape[3], self.factor)
