"""Table of denoisers: a row for each variant of the HAE family and for each other network; imports no torch."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from heterodiff.errors import ConfigError, unknown_name
from heterodiff.lazy import loaded
from heterodiff.models.defaults import HEAD_CHANNELS, LEAN_NORM_GROUPS

if TYPE_CHECKING:
    from heterodiff.models.backbone import Backbone


@dataclass(frozen=True)
class HybridSpec:
    """Differences between the hybrid blocks of the HAE variants.

    Attributes:
        linear_patches: make a regional token by a Linear over the flattened patch; otherwise by a shared 1x1
            convolution and the mean over the patch.
        bottleneck_mlp: C -> bottleneck_ratio C -> C instead of C -> 4C -> C.
        concat_fusion: 1x1(concat(a, b)) instead of 1x1((a + b) / 2).
        by_scale: the block of the published network, :class:`heterodiff.models.hybrid.ScaleHybridBlock`.
    """

    linear_patches: bool
    bottleneck_mlp: bool
    concat_fusion: bool
    by_scale: bool = False


@dataclass(frozen=True)
class Variant:
    """A named denoiser.

    Attributes:
        hybrid: its hybrid decoder block; None: a plain U-Net.
        pooled: whether the last residual block before each upsampling is a
            :class:`heterodiff.models.pooled.PooledResBlock`.
        defaults: arguments of :class:`heterodiff.models.unet.HAEUNet` where they are None.
        weights_of: the variant with the same weights and outputs, where there is one.
        tokens_of_none: whether attention sees condition tokens, made of zeros, where no row of a batch has a condition.
        network: ``module:name`` of its class, imported when it is built.
    """

    summary: str
    hybrid: HybridSpec | None = None
    pooled: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    weights_of: str | None = None
    tokens_of_none: bool = True
    network: str = "heterodiff.models.unet:HAEUNet"


_HAE = HybridSpec(linear_patches=True, bottleneck_mlp=False, concat_fusion=True)
_LITE = HybridSpec(linear_patches=False, bottleneck_mlp=False, concat_fusion=False)
_V2 = HybridSpec(linear_patches=False, bottleneck_mlp=True, concat_fusion=False)
_PUBLIC = HybridSpec(linear_patches=False, bottleneck_mlp=True, concat_fusion=True, by_scale=True)
_LEAN = {
    "use_scale_shift_norm": True,
    "num_head_channels": HEAD_CHANNELS,
    "condition_tokens": "one",
    "attention_side": 8,
    "norm_groups": LEAN_NORM_GROUPS,
}
_SAVING = {"memory_optimization": True}
_CONVOLUTIONS = _LEAN | {"attention_resolutions": ()}

VARIANTS = {
    "unet": Variant("the ADM U-Net with condition tokens"),
    "hae": Variant("hybrid decoder, one linear projection for each scale", _HAE),
    "hae-lite": Variant("shared patch embedding, mean fusion", _LITE),
    "hae-v2": Variant("as lite, with a bottleneck MLP", _V2),
    "hae-v2-conservative": Variant(
        "hae-v2 with recomputation: same outputs, less memory", _V2, defaults=_SAVING, weights_of="hae-v2"
    ),
    "hae-v2-conservative-public": Variant(
        "the published HAEUNetModelV2Conservative: attention of its own at each scale",
        _PUBLIC,
        defaults=_SAVING,
        tokens_of_none=False,
    ),
    "hae-v3": Variant("FiLM; attention to pooled maps in the decoder", pooled=True, defaults=_CONVOLUTIONS),
    "unet-lean": Variant("attention on maps of at most 8x8, one condition token, FiLM", defaults=_LEAN),
    "unet-conv": Variant("convolutions and FiLM alone", defaults=_CONVOLUTIONS | {"mid_attention": False}),
}
"""Denoisers of the HAE family."""
NETWORKS = {
    "film-unet": Variant(
        "for small latents, conditioned on a text embedding", network="heterodiff.models.film_unet:FiLMUNet"
    ),
}
"""Other denoisers."""


def list_models() -> list[str]:
    """List the denoisers that :func:`create_model` builds: ``VARIANTS`` of the HAE family, then ``NETWORKS``."""
    return [*VARIANTS, *NETWORKS]


def alike(variant: str) -> list[str]:
    """List the denoisers with the weights of ``variant``, itself included."""
    rows = VARIANTS | NETWORKS
    return [name for name in rows if (rows[name].weights_of or name) == (rows[variant].weights_of or variant)]


def network_class(variant: str) -> Any:
    """Import the class of the denoiser ``variant``.

    Raises:
        ConfigError: no such denoiser; the message suggests the nearest name.
    """
    if variant not in list_models():
        raise ConfigError(unknown_name("model variant", variant, list_models()))
    return loaded((VARIANTS | NETWORKS)[variant].network)


def create_model(variant: str, **config: Any) -> "Backbone":
    """Build a denoiser with fresh weights.

    Args:
        variant: one of :func:`list_models`.
        **config: arguments of :class:`heterodiff.models.unet.HAEUNet`, or for ``film-unet`` of
            :class:`heterodiff.models.film_unet.FiLMUNet`.

    Raises:
        ConfigError: an unknown variant or argument (the message suggests the nearest one), or a value that no
            network can be built from.
    """
    network = network_class(variant)
    known = [name for name in inspect.signature(network.__init__).parameters if name not in ("self", "variant")]
    for name in config:
        if name not in known:
            raise ConfigError(unknown_name("model argument", name, known))
    return network(**config) if variant in NETWORKS else network(variant=variant, **config)
