"""The denoisers by name: a row for each variant of the HAE family and for each other network; imports no torch."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from heterodiff.errors import ConfigError, unknown_name
from heterodiff.lazy import loaded

if TYPE_CHECKING:
    from heterodiff.models.backbone import Denoiser


@dataclass(frozen=True)
class HybridSpec:
    """What distinguishes the hybrid blocks of the HAE variants.

    Attributes:
        linear_patches: a Linear over each flattened patch makes its regional token; otherwise a shared 1x1
            convolution and the mean over the patch.
        bottleneck_mlp: C -> bottleneck_ratio C -> C instead of C -> 4C -> C.
        concat_fusion: 1x1(concat(a, b)) instead of 1x1((a + b) / 2).
    """

    linear_patches: bool
    bottleneck_mlp: bool
    concat_fusion: bool


@dataclass(frozen=True)
class Variant:
    """A named network.

    Attributes:
        hybrid: block added to the decoder before each upsampling; None for none.
        pooled: whether the last residual block before each upsampling is a
            :class:`heterodiff.models.pooled.PooledResBlock`.
        defaults: arguments of :class:`heterodiff.models.unet.HAEUNet` where they are None.
    """

    hybrid: HybridSpec | None = None
    pooled: bool = False
    summary: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LEAN = {"use_scale_shift_norm": True, "num_head_channels": 32, "condition_tokens": "one", "attention_side": 8}
_CONVOLUTIONS = _LEAN | {"attention_resolutions": ()}
_V2 = HybridSpec(linear_patches=False, bottleneck_mlp=True, concat_fusion=False)

VARIANTS: dict[str, Variant] = {
    "unet": Variant(summary="the ADM U-Net with condition tokens"),
    "unet-lean": Variant(summary="attention on maps of at most 8x8, one condition token, FiLM", defaults=_LEAN),
    "unet-conv": Variant(summary="convolutions and FiLM alone", defaults=_CONVOLUTIONS | {"mid_attention": False}),
    "hae-v3": Variant(
        pooled=True,
        summary="FiLM; in the decoder attention to pooled maps beside a convolution",
        defaults=_CONVOLUTIONS,
    ),
    "hae": Variant(
        HybridSpec(linear_patches=True, bottleneck_mlp=False, concat_fusion=True),
        summary="hybrid decoder, a linear projection a scale",
    ),
    "hae-lite": Variant(
        HybridSpec(linear_patches=False, bottleneck_mlp=False, concat_fusion=False),
        summary="shared patch embedding, mean fusion",
    ),
    "hae-v2": Variant(_V2, summary="as lite, with a bottleneck MLP"),
    "hae-v2-conservative": Variant(
        _V2, summary="hae-v2 with recomputation: same outputs, less memory", defaults={"memory_optimization": True}
    ),
}


@dataclass(frozen=True)
class Network:
    """A denoiser that is no variant of the HAE family: ``module:name`` of its class, imported when it is built."""

    network: str
    summary: str = ""


NETWORKS: dict[str, Network] = {
    "film-unet": Network("heterodiff.models.film_unet:FiLMUNet", "of small latents, steered by a text embedding"),
}


def list_models() -> list[str]:
    """Names of all denoisers that :func:`create_model` builds: ``VARIANTS`` of the HAE family, then ``NETWORKS``."""
    return [*VARIANTS, *NETWORKS]


def network_class(variant: str) -> Any:
    """The class of the denoiser ``variant``.

    Raises:
        ConfigError: no such denoiser; the nearest name is named.
    """
    if variant not in list_models():
        raise ConfigError(unknown_name("model variant", variant, list_models()))
    return loaded(NETWORKS[variant].network if variant in NETWORKS else "heterodiff.models.unet:HAEUNet")


def create_model(variant: str, **config: Any) -> "Denoiser":
    """Build a denoiser with fresh weights.

    Args:
        variant: one of :func:`list_models`.
        **config: arguments of :class:`heterodiff.models.unet.HAEUNet`, or for ``film-unet`` of
            :class:`heterodiff.models.film_unet.FiLMUNet`.

    Raises:
        ConfigError: an unknown variant or argument (the nearest known one is named), or a value that no network
            can be built from.
    """
    network = network_class(variant)
    known = [name for name in inspect.signature(network.__init__).parameters if name not in ("self", "variant")]
    for name in config:
        if name not in known:
            raise ConfigError(unknown_name("model argument", name, known))
    return network(**config) if variant in NETWORKS else network(variant=variant, **config)
