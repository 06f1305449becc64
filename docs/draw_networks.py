"""Draw the HAE family for docs/networks.md: ``python docs/draw_networks.py``.

Writes docs/images/networks.png and docs/images/attention_pattern.png. The layers of the U-Net are those of a model
built by ``heterodiff.create_model``, and the keys are those of ``make_pattern``; the hybrid block is drawn by hand.
"""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from torch import nn

import heterodiff as hd
from heterodiff.models.attention.patterns import Grid, make_pattern
from heterodiff.models.blocks import AttentionBlock, Downsample, ResBlock, Upsample
from heterodiff.models.hybrid import REGIONAL_PATCHES, HybridBlock

IMAGES = Path(__file__).parent / "images"
INK, MUTED = "#1f2430", "#6b7280"
KEYS, QUERIES = "#f2a93b", "#b02a2a"
SAMPLE_SIZE = 64
LAYERS = (
    (ResBlock, "residual block", "#9db8d9"),
    (AttentionBlock, "attention with condition tokens", "#f2c46d"),
    (HybridBlock, "hybrid block (HAE variants only)", "#d9534f"),
    (Downsample | Upsample, "downsampling, upsampling", "#c9cdd4"),
    (nn.Conv2d, "3x3 convolution, in and out", "#8fbf9f"),
)


def colour_of(layer: nn.Module) -> str:
    return next(colour for kind, _, colour in LAYERS if isinstance(layer, kind))


def rows_of_layers() -> tuple[list[list[nn.Module]], list[nn.Module], list[list[nn.Module]]]:
    """Layers of the encoder by level, of the middle, and of the decoder from the last level to the first."""
    model = hd.create_model("hae-v2", sample_size=SAMPLE_SIZE, model_channels=32, num_classes=2)
    encoder: list[list[nn.Module]] = [[]]
    for stage in model.input_blocks:
        encoder[-1].extend(stage)
        if isinstance(stage[-1], Downsample):
            encoder.append([])
    decoder: list[list[nn.Module]] = [[]]
    for stage in model.output_blocks:
        decoder[-1].extend(stage)
        if isinstance(stage[-1], Upsample):
            decoder.append([])
    decoder[-1].append(model.out[-1])
    return encoder, list(model.middle_block), decoder


def draw_row(axes: Axes, layers: list[nn.Module], left: float, y: float) -> float:
    """Boxes side by side from ``left``; returns the right end."""
    for i, layer in enumerate(layers):
        axes.add_patch(Rectangle((left + i + 0.07, y), 0.86, 0.62, facecolor=colour_of(layer), edgecolor=INK, lw=0.7))
    return left + len(layers)


def draw_unet(axes: Axes) -> None:
    """The U-Net as stairs down and up: a row a resolution."""
    encoder, middle, decoder = rows_of_layers()
    left, ends = 0.0, []
    for level, layers in enumerate(encoder):
        right = draw_row(axes, layers, left, -level)
        ends.append(right)
        side = SAMPLE_SIZE // 2**level
        axes.text(left - 0.25, 0.31 - level, f"{side}x{side}", ha="right", va="center", color=MUTED, fontsize=11)
        left = right - 1
    bottom = len(encoder) - 1
    start, end = ends[-1], draw_row(axes, middle, ends[-1], -bottom)
    axes.plot([start + 0.07, end - 0.07], [-bottom - 0.12] * 2, color=INK, lw=1.5)
    axes.text((start + end) / 2, -bottom - 0.2, "middle", ha="center", va="top", fontsize=11, color=INK)
    left = end
    for level, layers in zip(range(bottom, -1, -1), decoder, strict=True):
        right = draw_row(axes, layers, left, -level)
        if level < bottom:
            arrow = {"arrowstyle": "->", "color": MUTED, "lw": 1.1, "ls": "--"}
            axes.annotate("", (left - 0.05, 0.31 - level), (ends[level] + 0.05, 0.31 - level), arrowprops=arrow)
        left = right - 1
    middle_x = (ends[0] + right - len(decoder[-1])) / 2
    axes.text(
        middle_x,
        0.42,
        "skip connections, one into each residual block of the decoder",
        ha="center",
        fontsize=11,
        color=MUTED,
    )
    axes.text(0, 0.85, "Encoder: convolutions, attention at low resolution", fontsize=13, weight="bold", color=INK)
    axes.text(right, 0.85, "Decoder: the same, with hybrid blocks", fontsize=13, weight="bold", color=INK, ha="right")
    handles = [Patch(facecolor=colour, edgecolor=INK, label=name) for _, name, colour in LAYERS]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, frameon=False, fontsize=11)
    axes.set(xlim=(-2.8, right + 0.2), ylim=(-bottom - 0.6, 1.3))
    axes.axis("off")


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = "white", height: float = 0.8) -> None:
    """A rounded box with its left end at ``x``, centred on ``y``."""
    shape = FancyBboxPatch(
        (x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=INK
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=10.5, color=INK)


def line(axes: Axes, *points: tuple[float, float]) -> None:
    """A path through ``points`` that ends in an arrow."""
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color=INK, lw=1.1, solid_capstyle="round")
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=arrow)


def draw_hybrid_block(axes: Axes) -> None:
    """The hybrid block of hae-v2 (``HybridBlock`` and ``MultiScaleTransformer``), left to right."""
    conv, tokens, attend = "#dce6f2", "#fbe7c4", "#f2c46d"
    axes.text(0, 3.55, "The hybrid block (hae-v2)", fontsize=13, weight="bold", color=INK)
    axes.text(0.05, 0.9, "$x$", fontsize=14, va="center", color=INK)
    line(axes, (0.4, 0.9), (0.75, 0.9))
    box(axes, 0.75, 0.9, 1.75, "$h$ = $x$ + time\nand condition")
    line(axes, (2.5, 0.9), (2.85, 0.9), (2.85, 2.6), (3.3, 2.6))
    axes.text(3.3, 3.2, "convolution branch", fontsize=11, color=MUTED, va="center")
    box(axes, 3.3, 2.6, 3.0, "GroupNorm, SiLU, 3x3", conv)
    line(axes, (6.3, 2.6), (6.7, 2.6))
    box(axes, 6.7, 2.6, 3.0, "GroupNorm, SiLU, 3x3", conv)
    line(axes, (9.7, 2.6), (15.1, 2.6), (15.1, 1.35))
    axes.text(12.0, 2.75, "$a$", fontsize=14, color=INK)

    axes.text(3.3, 1.55, "multi-scale sparse Transformer branch (MSTB)", fontsize=11, color=MUTED, va="center")
    line(axes, (2.85, 0.9), (2.85, -0.4), (3.3, -0.4))
    box(axes, 3.3, -0.4, 1.3, "1x1", tokens)
    for y, name in (
        (0.7, "local tokens:\nevery position"),
        (-0.4, "means of\n4x4 patches"),
        (-1.5, "means of\n8x8 patches"),
    ):
        line(axes, (4.6, -0.4), (4.85, -0.4), (4.85, y), (5.15, y))
        box(axes, 5.15, y, 2.0, name, tokens)
        line(axes, (7.15, y), (8.05, y))
    axes.text(7.55, 0.85, "q, k, v", fontsize=10, ha="center", color=INK)
    axes.text(7.55, -0.25, "k, v", fontsize=10, ha="center", color=INK)
    axes.text(7.55, -1.35, "k, v", fontsize=10, ha="center", color=INK)
    box(axes, 8.05, -0.4, 1.9, "sparse\nmulti-head\nattention", attend, height=3.0)
    line(axes, (9.95, -0.4), (10.6, -0.4))
    axes.text(10.25, -0.25, "$A$", fontsize=13, ha="center", color=INK)
    box(axes, 10.6, -0.4, 3.1, "$b$ = $h$ + $A$ + MLP(LN($A$))", tokens)
    line(axes, (13.7, -0.4), (15.1, -0.4), (15.1, 0.45))
    axes.text(14.4, -0.25, "$b$", fontsize=14, ha="center", color=INK)
    box(axes, 14.1, 0.9, 2.0, "1x1 of\n($a$ + $b$) / 2", conv, height=0.9)
    line(axes, (16.1, 0.9), (16.75, 0.9))
    axes.text(16.95, 0.9, "+", fontsize=15, ha="center", va="center", color=INK)
    line(axes, (0.55, 0.9), (0.55, -2.15), (16.95, -2.15), (16.95, 0.65))
    line(axes, (17.15, 0.9), (17.6, 0.9))
    axes.text(17.7, 0.9, "out", fontsize=12, va="center", color=INK)
    axes.set(xlim=(-0.2, 18.4), ylim=(-2.4, 3.9))
    axes.axis("off")


def draw_pattern(row: np.ndarray, side: int) -> None:
    """Three maps (positions, then the tokens of each patch size) and what the queries of one tile see of them."""
    grid = Grid(side, side, REGIONAL_PATCHES)
    config = hd.create_model("hae-v2", sample_size=SAMPLE_SIZE, model_channels=32).config
    pattern = make_pattern(config.attention_pattern, grid, config.sparsity, config.max_keys, config.pattern_seed)
    tile = np.flatnonzero((pattern.queries == side * (side * 3 // 8) + side * 3 // 8).any(axis=1))[0]
    seen = np.zeros(grid.length, dtype=int)
    seen[pattern.keys[tile]] = 1
    local = seen[: grid.local].copy()
    local[pattern.queries[tile]] = 2
    maps = [local.reshape(side, side)]
    offset = grid.local
    for height, width in grid.regional:
        maps.append(seen[offset : offset + height * width].reshape(height, width))
        offset += height * width
    names = ["every position", *(f"means of {p}x{p} patches" for p in REGIONAL_PATCHES)]
    for axes, name, values in zip(row, names, maps, strict=True):
        axes.imshow(values, cmap=ListedColormap(["#eef0f3", KEYS, QUERIES]), vmin=0, vmax=2)
        count = int((values > 0).sum())
        axes.set_title(f"{name}\n{count} of {values.size:,} seen", fontsize=11, color=INK)
        axes.set(xticks=[], yticks=[])
    rows, columns = np.divmod(pattern.queries[tile], side)
    for axes, p in zip(row[1:], REGIONAL_PATCHES, strict=True):
        corner = columns.min() / p - 0.5, rows.min() / p - 0.5
        size = (np.ptp(columns) + 1) / p, (np.ptp(rows) + 1) / p
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=QUERIES, lw=2))
    total = pattern.keys.shape[1]
    label = f"{side}x{side} map\n{total} of {grid.length:,} keys"
    row[0].set_ylabel(label, fontsize=12, color=INK, labelpad=10)


def main() -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(12, 8.2), height_ratios=(3.6, 4.2))
    draw_unet(top)
    draw_hybrid_block(bottom)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, hspace=0.22)
    figure.savefig(IMAGES / "networks.png", dpi=120, facecolor="white")

    figure, rows = plt.subplots(2, 3, figsize=(9.5, 7.4))
    for row, side in zip(rows, (64, 128), strict=True):
        draw_pattern(row, side)
    handles = [Patch(facecolor=QUERIES, label="queries of one tile"), Patch(facecolor=KEYS, label="keys they see")]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=11)
    figure.subplots_adjust(left=0.09, right=0.99, top=0.93, bottom=0.07, wspace=0.08, hspace=0.22)
    figure.savefig(IMAGES / "attention_pattern.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
