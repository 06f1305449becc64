"""The kinds of checkpoint that can be imported: one row each, every difference a column."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from heterodiff.models.variants import VARIANTS


@dataclass(frozen=True)
class CheckpointFormat:
    """What the weights of one family of checkpoints mean beyond their names and shapes.

    Attributes:
        origin: for messages.
        variants: that checkpoints of the format can belong to.
        activations: variant -> activation of the norms, where it is not SiLU, and why.
        condition_tokens: whether attention blocks may have an ``encoder_kv``.
        unused_tokens: whether unconditional networks store ``encoder_kv`` weights that they never apply.
        qkv_orders: whether the rows of ``qkv`` may be in the new order, [q; k; v] over all heads at once.
    """

    origin: str
    variants: tuple[str, ...]
    activations: Mapping[str, str] = field(default_factory=dict)
    condition_tokens: bool = False
    unused_tokens: bool = False
    qkv_orders: bool = False


FORMATS: dict[str, CheckpointFormat] = {
    "guided-diffusion": CheckpointFormat(
        origin="OpenAI guided-diffusion (ADM)",
        variants=("unet",),
        qkv_orders=True,
    ),
    "anofpdm": CheckpointFormat(
        origin="AnoFPDM and the earlier HAE networks",
        variants=tuple(VARIANTS),
        activations={"unet": "identity", "hae": "identity"},
        condition_tokens=True,
        unused_tokens=True,
    ),
}


def to_legacy_order(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return ``tensors`` with the rows of each ``qkv`` moved from the new order to the legacy one.

    New: all heads' q, then all k, then all v. Legacy: [q; k; v] of one head after the other.

    Args:
        config: holds ``num_heads`` or ``num_head_channels``, and perhaps ``num_heads_upsample``.
    """
    moved = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".qkv.weight", ".qkv.bias")):
            channels = tensor.shape[0] // 3
            if config.get("num_head_channels"):
                heads = channels // config["num_head_channels"]
            elif name.startswith("output_blocks.") and config.get("num_heads_upsample"):
                heads = config["num_heads_upsample"]
            else:
                heads = config["num_heads"]
            rows = tensor.unflatten(0, (3, heads, channels // heads))
            moved[name] = rows.transpose(0, 1).flatten(0, 2).contiguous()
    return moved
