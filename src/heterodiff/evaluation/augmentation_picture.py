"""The picture of an augmentation study: accuracies of the three conditions, and what is taken for what."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from heterodiff.evaluation.augmentation_sets import CONDITIONS

COLOURS = {"real": "#5b6577", "generated": "#c4622d", "both": "#2458a6"}
TITLES = {"real": "real\nonly", "generated": "generated\nonly", "both": "real +\ngenerated"}
INK, SOFT = "#1d2433", "#5b6577"
MAX_NAMED_CLASSES = 40
MAX_NUMBERED_CLASSES = 12
MAX_NAME_LENGTH = 18


def augmentation_picture(study: Mapping[str, Any]) -> bytes:
    """Draw a study (see :func:`heterodiff.evaluation.augmentation.augmentation_study`) and return a PNG.

    Left, the accuracy of each condition: mean over seeds with its 95 % interval, a dot per seed, the share of the
    commonest class dashed. Right, the confusion matrices: percent of the row with the count, summed over seeds,
    below; with more than 12 classes colours alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [_short(name) for name in study["classes"]]
    side = min(8.0, max(2.6, 0.5 * len(names) + 0.4))
    figure = Figure(figsize=(4.4 + 3 * side, side + 1.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4, width_ratios=[3.4, side, side, side])
    _draw_accuracies(panels[0], study)
    for panel, key in zip(panels[1:], CONDITIONS, strict=True):
        _draw_confusion(panel, study["conditions"][key]["confusion"], names, key, first=key == "real")
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in letters that the font lacks shows boxes
        figure.savefig(target, format="png")
    return target.getvalue()


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def _draw_accuracies(axes: Any, study: Mapping[str, Any]) -> None:
    for position, key in enumerate(CONDITIONS):
        condition = study["conditions"][key]
        accuracy = condition["accuracy"]
        value, low, high = (100 * accuracy[name] for name in ("value", "low", "high"))
        axes.plot([position, position], [low, high], color=COLOURS[key], linewidth=3, alpha=0.45, solid_capstyle="butt")
        axes.plot([position - 0.16, position + 0.16], [value, value], color=COLOURS[key], linewidth=3)
        shares = [100 * row["value"] for row in condition["per_seed"]]
        offsets = [position + 0.28 + 0.07 * (k % 3) for k in range(len(shares))]
        axes.scatter(offsets, shares, s=16, color=COLOURS[key], edgecolors="white", linewidths=0.6, zorder=3)
        axes.annotate(f"{value:.1f} %", (position, high), (0, 4), textcoords="offset points", ha="center", color=INK)
    chance = 100 * study["chance"]
    axes.axhline(chance, color=SOFT, linewidth=1, linestyle="--")
    lowest = min(100 * c["accuracy"]["low"] for c in study["conditions"].values())
    lowest = min(lowest, *(100 * row["value"] for c in study["conditions"].values() for row in c["per_seed"]))
    # Differences of a few points must be seen; where chance is near it belongs into the picture.
    bottom = 0.0 if lowest < chance + 30 else 10 * int((lowest - 5) // 10)
    axes.set_ylim(max(0.0, bottom), 100 + (100 - bottom) * 0.08)
    if bottom == 0:
        axes.annotate(
            "commonest class", (2.5, chance), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=SOFT
        )
    axes.set_xlim(-0.5, 2.6)
    axes.set_xticks(range(3), [TITLES[key] for key in CONDITIONS])
    count = len(study["seeds"])
    axes.set_title(
        f"accuracy on {study['n_held_out']:,} real images, %\nmean, 95 % interval, {count} seed{'s' * (count > 1)}",
        fontsize=10,
        color=INK,
    )
    axes.grid(axis="y", color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=9)


def _draw_confusion(axes: Any, counts: Sequence[Sequence[int]], names: Sequence[str], key: str, first: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shares = [[100 * cell / max(1, sum(row)) for cell in row] for row in counts]
    colours = LinearSegmentedColormap.from_list("heterodiff", ["#ffffff", COLOURS[key]])
    axes.imshow(shares, cmap=colours, vmin=0, vmax=100)
    if len(names) <= MAX_NUMBERED_CLASSES:
        for row, cells in enumerate(counts):
            for column, cell in enumerate(cells):
                if cell:
                    ink = "white" if shares[row][column] > 55 else INK
                    axes.text(
                        column, row, f"{shares[row][column]:.0f}\n({cell:,})", ha="center", va="center", color=ink,
                        fontsize=8,
                    )  # fmt: skip
    shown = list(names) if len(names) <= MAX_NAMED_CLASSES else []
    axes.set_xticks(range(len(shown)), shown, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(shown)), shown if first else [""] * len(shown))
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a dollar sign in a name is one
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    axes.spines[:].set_color("#aab2bf")
    axes.set_title(f"trained on {CONDITIONS[key]}", fontsize=10, color=INK)
    axes.set_xlabel("read as", fontsize=9, color=SOFT)
    if first:
        axes.set_ylabel("true class, % of its images (count)", fontsize=9, color=SOFT)
