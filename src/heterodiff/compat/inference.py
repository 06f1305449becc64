"""What the names and shapes of a guided-diffusion state dict say about the network they belong to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heterodiff.errors import CheckpointError
from heterodiff.models.variants import HybridSpec

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inferred:
    """``config``: arguments of ``HAEUNet`` that the weights determine; ``hybrid``: their hybrid block, if any."""

    config: dict[str, Any]
    hybrid: HybridSpec | None


@dataclass(frozen=True)
class _Levels:
    """The resolution levels: width and attention of each, and how they are joined."""

    layers_per_block: int
    widths: list[int]
    attended: list[bool]
    resblock_updown: bool
    conv_resample: bool | None


def infer(shapes: Shapes) -> Inferred:
    """Read the whole configuration that names and shapes determine.

    The number of attention heads, the image size, dropout and activations leave no trace in them.

    Raises:
        CheckpointError: they are not those of a guided-diffusion U-Net.
    """
    model_channels = _dim(shapes, "time_embed.0.weight", 1)
    levels = _infer_levels(shapes)
    config: dict[str, Any] = {
        "in_channels": _dim(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": _dim(shapes, "out.2.weight", 0),
        "model_channels": model_channels,
        "layers_per_block": levels.layers_per_block,
        "channel_mult": tuple(_multiple(width, model_channels) for width in levels.widths),
        "attention_resolutions": tuple(2**i for i, attended in enumerate(levels.attended) if attended),
        "use_scale_shift_norm": _dim(shapes, "middle_block.0.emb_layers.1.weight", 0)
        == 2 * _dim(shapes, "middle_block.0.out_layers.0.weight", 0),
        "resblock_updown": levels.resblock_updown,
        **_infer_classes(shapes),
    }
    if levels.conv_resample is not None:
        config["conv_resample"] = levels.conv_resample
    hybrid, ratio = _infer_hybrid(shapes)
    if ratio is not None:
        config["bottleneck_ratio"] = ratio
    return Inferred(config, hybrid)


def has_condition_tokens(shapes: Shapes) -> bool:
    return any(".encoder_kv." in name for name in shapes)


def _dim(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) <= axis:
        found = f"its shape is {shape}" if name in shapes else "missing"
        raise CheckpointError(f"not a guided-diffusion U-Net: '{name}': {found}")
    return max(1, shape[axis])


def _infer_levels(shapes: Shapes) -> _Levels:
    blocks = _count(shapes, "output_blocks")
    if len(shapes.get("input_blocks.0.0.weight", ())) > 4:
        raise CheckpointError("a network of volumes (3-d convolutions); expected one of images")
    occupied = {int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d{1,6})\.", name))}
    # A downsampling is a convolution `op`, or average pooling, which leaves a gap in the numbering.
    downs = [i for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in shapes or i not in occupied]
    # A residual block after the first layer of a decoder stage can only be an upsampling one.
    ups = [i for i in range(blocks) if any(f"output_blocks.{i}.{j}.in_layers.0.weight" in shapes for j in (1, 2, 3))]
    conv_resample = None
    if downs:
        layers_per_block = downs[0] - 1
        conv_resample = f"input_blocks.{downs[0]}.0.op.weight" in shapes
    else:
        layers_per_block = ups[0] if ups else blocks - 1
    stride = layers_per_block + 1
    if layers_per_block < 1 or blocks % stride:
        raise CheckpointError(
            f"not a guided-diffusion U-Net: {blocks} decoder blocks, resampling in encoder blocks {downs[:4]} "
            f"and decoder blocks {ups[:4]}"
        )
    firsts = range(1, blocks, stride)
    return _Levels(
        layers_per_block,
        [_dim(shapes, f"input_blocks.{i}.0.out_layers.3.weight", 0) for i in firsts],
        [f"input_blocks.{i}.1.qkv.weight" in shapes for i in firsts],
        bool(ups),
        conv_resample,
    )


def _count(shapes: Shapes, group: str) -> int:
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{group}\.(\d{{1,6}})\.", name))]
    # Each block has several tensors, so a larger number can only be made up.
    if not numbers or max(numbers) >= len(shapes):
        raise CheckpointError(f"not a guided-diffusion U-Net: '{group}.*': {'out of range' if numbers else 'missing'}")
    return max(numbers) + 1


def _multiple(width: int, model_channels: int) -> int | float:
    return width // model_channels if width % model_channels == 0 else width / model_channels


def _infer_classes(shapes: Shapes) -> dict[str, Any]:
    if "label_emb.weight" not in shapes:
        return {"num_classes": None}
    return {
        "num_classes": _dim(shapes, "label_emb.weight", 0),
        "class_embedding": "mlp" if "class_emb.0.weight" in shapes else "direct",
        "condition_tokens": has_condition_tokens(shapes),
    }


def _infer_hybrid(shapes: Shapes) -> tuple[HybridSpec | None, float | None]:
    """The hybrid block and, of a bottleneck MLP, its ratio."""
    blocks = sorted({name.split(".transformer_branch.")[0] for name in shapes if ".transformer_branch." in name})
    if not blocks:
        return None, None
    first = f"{blocks[0]}.transformer_branch"
    spec = HybridSpec(
        linear_patches=f"{first}.patch_projections.0.weight" in shapes,
        bottleneck_mlp=f"{first}.mlp.mlp.0.weight" in shapes,
        concat_fusion=_dim(shapes, f"{blocks[0]}.fusion_conv.weight", 1)
        == 2 * _dim(shapes, f"{blocks[0]}.fusion_conv.weight", 0),
    )
    if not spec.bottleneck_mlp:
        return spec, None
    weights = [f"{block}.transformer_branch.mlp.mlp.0.weight" for block in blocks]
    return spec, _bottleneck_ratio({_dim(shapes, name, 1): _dim(shapes, name, 0) for name in weights})


def _bottleneck_ratio(hidden: Mapping[int, int]) -> float:
    """A ratio r with int(r C) = ``hidden[C]`` for every width C; the quotients are rounded down to whole channels."""
    candidates = [0.25, *(h / c for c, h in hidden.items()), *((h + 0.5) / c for c, h in hidden.items())]
    for ratio in candidates:
        if all(max(1, int(c * ratio)) == h for c, h in hidden.items()):
            return ratio
    raise CheckpointError(f"bottleneck MLPs of no common ratio: channels -> hidden {dict(sorted(hidden.items()))}")
