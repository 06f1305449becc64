"""The variants of the HAE family: one row each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heterodiff.errors import ConfigError, unknown_name
from heterodiff.models.hybrid import HybridSpec

if TYPE_CHECKING:
    from heterodiff.models.unet import HAEUNet


@dataclass(frozen=True)
class Variant:
    """A named network: its hybrid decoder block (None: a plain U-Net) and its memory default."""

    hybrid: HybridSpec | None
    memory_optimization: bool = False
    summary: str = ""


_V2 = HybridSpec(linear_patches=False, bottleneck_mlp=True, concat_fusion=False)

VARIANTS: dict[str, Variant] = {
    "unet": Variant(None, summary="the ADM U-Net with condition tokens"),
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
        _V2, memory_optimization=True, summary="hae-v2 with recomputation: same outputs, less memory"
    ),
}


def list_models() -> list[str]:
    """Names of all variants that :func:`create_model` builds."""
    return list(VARIANTS)


def create_model(variant: str, **config: Any) -> "HAEUNet":
    """Build a denoiser with fresh weights.

    Args:
        variant: one of :func:`list_models`.
        **config: arguments of :class:`heterodiff.models.unet.HAEUNet`.

    Raises:
        ConfigError: an unknown variant or argument (the nearest known one is named), or a value that no network
            can be built from.
    """
    import inspect

    from heterodiff.models.unet import HAEUNet

    known = [name for name in inspect.signature(HAEUNet.__init__).parameters if name not in ("self", "variant")]
    for name in config:
        if name not in known:
            raise ConfigError(unknown_name("model argument", name, known))
    return HAEUNet(variant=variant, **config)
