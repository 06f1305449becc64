"""Configuration of a guided-diffusion network from the names and shapes of its weights."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from heterodiff.errors import CheckpointError
from heterodiff.models.variants import HybridSpec


class UnknownLayout(CheckpointError):
    """Weights whose names are not those of a guided-diffusion U-Net."""


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inferred:
    """``config``: arguments of ``HAEUNet`` that the weights determine; ``hybrid``: their hybrid block, if any."""

    config: dict[str, Any]
    hybrid: HybridSpec | None


def infer(shapes: Shapes) -> Inferred:
    """Infer everything that names and shapes determine.

    They do not determine the number of attention heads, the image size, dropout and activations.

    Raises:
        CheckpointError: they are not those of a guided-diffusion U-Net.
    """
    hybrid, ratio = _infer_hybrid(shapes)
    config: dict[str, Any] = {
        "in_channels": _dim(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": _dim(shapes, "out.2.weight", 0),
        "model_channels": _dim(shapes, "time_embed.0.weight", 1),
        **_infer_levels(shapes),
        "use_scale_shift_norm": _dim(shapes, "middle_block.0.emb_layers.1.weight", 0)
        == 2 * _dim(shapes, "middle_block.0.out_layers.0.weight", 0),
        **_infer_classes(shapes),
        **ratio,
    }
    return Inferred(config, hybrid)


def _dim(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) <= axis:
        found = f"its shape is {shape}" if name in shapes else "missing"
        raise UnknownLayout(f"not a guided-diffusion U-Net: '{name}': {found}")
    return max(1, shape[axis])


def _infer_levels(shapes: Shapes) -> dict[str, Any]:
    """Infer width and attention of each resolution level, and how levels are joined."""
    if len(shapes.get("input_blocks.0.0.weight", ())) > 4:
        raise CheckpointError("a network of volumes (3-d convolutions); expected one of images")
    blocks = _count(shapes, "output_blocks")
    occupied = _numbers(shapes, "input_blocks")
    # A downsampling is a convolution `op`, or average pooling, which leaves a gap in the numbering.
    downs = [i for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in shapes or i not in occupied]
    # A residual block after the first layer of a decoder stage can only be an upsampling one.
    ups = [i for i in range(blocks) if any(f"output_blocks.{i}.{j}.in_layers.0.weight" in shapes for j in (1, 2, 3))]
    stride = [*downs, *(up + 1 for up in ups), blocks][0]  # layers of a level and its resampling
    if stride < 2 or blocks % stride:
        raise UnknownLayout(
            f"not a guided-diffusion U-Net: {blocks} decoder blocks, resampling in encoder blocks {downs[:4]} "
            f"and decoder blocks {ups[:4]}"
        )
    base = _dim(shapes, "time_embed.0.weight", 1)
    firsts = range(1, blocks, stride)
    widths = [_dim(shapes, f"input_blocks.{i}.0.out_layers.3.weight", 0) for i in firsts]
    config = {
        "layers_per_block": stride - 1,
        "channel_mult": tuple(width / base if width % base else width // base for width in widths),
        "attention_resolutions": tuple(
            2**level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in shapes
        ),
        "resblock_updown": bool(ups),
    }
    return {**config, "conv_resample": f"input_blocks.{downs[0]}.0.op.weight" in shapes} if downs else config


def _count(shapes: Shapes, group: str) -> int:
    numbers = _numbers(shapes, group)
    # Each block has several tensors, so a larger number can only be made up.
    if not numbers or max(numbers) >= len(shapes):
        raise UnknownLayout(f"not a guided-diffusion U-Net: '{group}.*': {'out of range' if numbers else 'missing'}")
    return max(numbers) + 1


def _numbers(shapes: Shapes, group: str) -> set[int]:
    return {int(match[1]) for name in shapes if (match := re.match(rf"{group}\.(\d{{1,6}})\.", name))}


def _infer_classes(shapes: Shapes) -> dict[str, Any]:
    if "label_emb.weight" not in shapes:
        return {"num_classes": None}
    return {
        "num_classes": _dim(shapes, "label_emb.weight", 0),
        "class_embedding": "mlp" if "class_emb.0.weight" in shapes else "direct",
        "condition_tokens": any(".encoder_kv." in name for name in shapes),
    }


def is_by_scale(names: Iterable[str]) -> bool:
    """Return whether weights of these names have the hybrid blocks of the published HAEUNetModelV2Conservative."""
    return any(".transformer_block.scale_fusion." in name for name in names)


def _infer_hybrid(shapes: Shapes) -> tuple[HybridSpec | None, dict[str, float]]:
    """Infer the hybrid block, and the ``bottleneck_ratio`` of one with a bottleneck MLP."""
    by_scale = is_by_scale(shapes)
    branch, fusion = (
        ("transformer_block", "fusion.0.weight") if by_scale else ("transformer_branch", "fusion_conv.weight")
    )
    blocks = sorted({name.split(f".{branch}.")[0] for name in shapes if f".{branch}." in name})
    if not blocks:
        return None, {}
    first = f"{blocks[0]}.{branch}"
    fusion = f"{blocks[0]}.{fusion}"
    spec = HybridSpec(
        linear_patches=f"{first}.patch_projections.0.weight" in shapes,
        bottleneck_mlp=f"{first}.mlp.mlp.0.weight" in shapes,
        concat_fusion=_dim(shapes, fusion, 1) == 2 * _dim(shapes, fusion, 0),
        by_scale=by_scale,
    )
    if not spec.bottleneck_mlp:
        return spec, {}
    weights = [f"{block}.{branch}.mlp.mlp.0.weight" for block in blocks]
    ratio = _bottleneck_ratio({_dim(shapes, name, 1): _dim(shapes, name, 0) for name in weights})
    return spec, {"bottleneck_ratio": ratio}


def _bottleneck_ratio(hidden: Mapping[int, int]) -> float:
    """Return a ratio r with int(r C) = ``hidden[C]`` for every width C; the hidden widths were rounded down."""
    candidates = [0.25, *(h / c for c, h in hidden.items()), *((h + 0.5) / c for c, h in hidden.items())]
    for ratio in candidates:
        if all(max(1, int(c * ratio)) == h for c, h in hidden.items()):
            return ratio
    raise CheckpointError(f"bottleneck MLPs of no common ratio: channels -> hidden {dict(sorted(hidden.items()))}")
