"""Training curves as one SVG, drawn without pyplot's global state."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heterodiff.report.formatting import is_number

MAX_POINTS = 1_500
FEW_POINTS = 5
PER_LINE = 3  # small panels side by side
ACCENT, PALE, SECOND = "#2458a6", "#b9cbe6", "#c4622d"
NAMES = {"lr": "learning rate", "grad_norm": "gradient norm", "images_per_second": "images per second"}
FROM_ZERO = ("lr", "images_per_second")
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#aab2bf",
    "axes.grid": True,
    "axes.labelcolor": "#5b6577",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.xmargin": 0.01,
    "grid.color": "#e8ebf0",
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "heterodiff",
    "xtick.color": "#5b6577",
    "xtick.labelsize": 8,
    "ytick.color": "#5b6577",
    "ytick.labelsize": 8,
}


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps and values of ``key`` where both are finite numbers, in order of the steps."""
    found: dict[float, float] = {}
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if is_number(step) and is_number(value):
            found[step] = value  # a resumed run repeats steps: the last one counts
    return sorted(found), [found[step] for step in sorted(found)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last ``window`` values at every position (fewer at the start)."""
    totals = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((totals[ends] - totals[starts]) / (ends - starts)).tolist()


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    stride = math.ceil(len(steps) / MAX_POINTS) or 1
    return steps[::stride], values[::stride]


def _draw_loss(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = series(rows, "loss")
    window = max(5, len(losses) // 40)
    many = len(losses) > 2 * window
    axes.plot(*_thin(steps, losses), color=PALE if many else ACCENT, linewidth=0.9 if many else 1.6, label="loss")
    if many:
        means = _thin(steps, running_mean(losses, window))
        axes.plot(*means, color=ACCENT, linewidth=1.8, label=f"mean of {window} rows")
    val_steps, val_losses = series(rows, "val_loss")
    if val_steps:
        # A lone point has no line to be seen by, and may lie on the edge of the axes.
        size = 3 if len(val_steps) > FEW_POINTS else 7
        axes.plot(*_thin(val_steps, val_losses), color=SECOND, linewidth=1.6, marker="o", markersize=size)
        axes.lines[-1].set(label="held-out images", clip_on=False, zorder=3)
    shown = losses + val_losses
    if min(shown) > 0 and max(shown) > 8 * min(shown):
        axes.set_yscale("log")
    axes.legend(fontsize=8)


def _held_out_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys, but the loss, that have a curve on held-out images, or a point there and a curve on training images."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("val_") and key != "val_loss")
    return [key for key in keys if _points(rows, key) >= 2 or (_points(rows, key) and _points(rows, key[4:]) >= 2)]


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    return len(series(rows, key)[0])


def _draw_held_out(axes: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Draw a number measured on held-out images over the same of the training images, if that was logged."""
    steps, values = series(rows, key[4:])
    if len(steps) >= 2:
        axes.plot(*_thin(steps, values), color=PALE, label="training images")
    axes.plot(*_thin(*series(rows, key)), color=SECOND, marker="o", markersize=3, clip_on=False, zorder=3)
    axes.lines[-1].set(label="held-out images")
    axes.legend(fontsize=7)


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    axes.set_title(NAMES.get(key, key.removeprefix("val_").replace("_", " ")), parse_math=False)
    if key == "loss":
        _draw_loss(axes, rows)
        return
    if key in NAMES:
        axes.plot(*_thin(*series(rows, key)), color=ACCENT)
    else:
        _draw_held_out(axes, rows, key)
    axes.locator_params(axis="x", nbins=5)
    if key in FROM_ZERO:
        axes.set_ylim(bottom=0)


def curves_svg(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draw loss, learning rate, gradient norm, images per second and all numbers of held-out images over the steps.

    Args:
        rows: rows of ``metrics.jsonl``; keys that are missing or not finite are left out.

    Returns:
        An SVG, or None where there are not two points of anything to draw.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    loss, small = ([key for key in keys if _points(rows, key) >= 2] for keys in (["loss"], NAMES))
    held_out = _held_out_keys(rows)
    lines = [loss, small, *(held_out[k : k + PER_LINE] for k in range(0, len(held_out), PER_LINE))]
    lines = [keys for keys in lines if keys]
    if not lines:
        return None
    heights = [2.0 if keys == loss else 1.0 for keys in lines]
    target = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.1 * sum(heights)), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.add_gridspec(len(lines), 1, height_ratios=heights)
        for line, keys in enumerate(lines):
            cells = grid[line].subgridspec(1, PER_LINE if keys[0] in held_out else len(keys))
            for column, key in enumerate(keys):
                _draw(figure.add_subplot(cells[column]), rows, key)
        figure.axes[0].set_xlabel("step")
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()
