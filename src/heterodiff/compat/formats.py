"""The formats of checkpoint that can be imported: one row each, every difference a column."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckpointFormat:
    """Meaning of the weights of a family of checkpoints beyond their names and shapes.

    Attributes:
        origin: name of the family for messages.
        variants: variants of network that its checkpoints can belong to.
        without: part of tensor names that the family does not have -> its name for messages.
        identity_norms: variants whose norms ignored their activation; the others have SiLU.
        qkv_orders: whether the rows of ``qkv`` may be in the new order, [q; k; v] over all heads at once.
    """

    origin: str
    variants: tuple[str, ...]
    without: Mapping[str, str] = field(default_factory=dict)
    identity_norms: tuple[str, ...] = ()
    qkv_orders: bool = False


FORMATS: dict[str, CheckpointFormat] = {
    "guided-diffusion": CheckpointFormat(
        origin="OpenAI guided-diffusion (ADM)",
        variants=("unet",),
        without={
            ".encoder_kv.": "condition tokens (encoder_kv)",
            ".transformer_branch.": "hybrid blocks",
            ".cnn_block.": "hybrid blocks",
        },
        qkv_orders=True,
    ),
    "anofpdm": CheckpointFormat(
        origin="AnoFPDM and the earlier HAE networks",
        variants=("unet", "hae", "hae-lite", "hae-v2", "hae-v2-conservative", "hae-v2-conservative-public"),
        identity_norms=("unet", "hae"),
    ),
}
