"""Training curves as one SVG, drawn without pyplot's global state."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from heterodiff.report.formatting import is_number

MAX_POINTS = 1_500
FEW_POINTS = 5
PER_LINE = 3  # small panels side by side
ACCENT, PALE, SECOND = "#2458a6", "#b9cbe6", "#c4622d"


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
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


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
    axes.legend(frameon=False, fontsize=8)


def _held_out_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys measured on held-out images, but the loss, of which there is a curve: of them, or of the training images."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("val_") and key != "val_loss")
    return [
        key
        for key in keys
        if len(series(rows, key)[0]) >= 2 or (series(rows, key)[0] and len(series(rows, key[4:])[0]) >= 2)
    ]


def _draw_held_out(axes: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Draw a number measured on held-out images over the same of the training images, if that was logged."""
    steps, values = series(rows, key[4:])
    if len(steps) >= 2:
        axes.plot(*_thin(steps, values), color=PALE, linewidth=1.3, label="training images")
    steps, values = series(rows, key)
    axes.plot(*_thin(steps, values), color=SECOND, linewidth=1.3, marker="o", markersize=3, clip_on=False, zorder=3)
    axes.lines[-1].set(label="held-out images")
    axes.legend(frameon=False, fontsize=7)


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

    names = {"lr": "learning rate", "grad_norm": "gradient norm", "images_per_second": "images per second"}
    small = [key for key in names if len(series(rows, key)[0]) >= 2]
    held_out = _held_out_keys(rows)
    has_loss = len(series(rows, "loss")[0]) >= 2
    if not has_loss and not small and not held_out:
        return None
    lines = [part for part in (small, *(held_out[k : k + PER_LINE] for k in range(0, len(held_out), PER_LINE))) if part]
    heights = ([2.0] if has_loss else []) + [1.0] * len(lines)
    figure = Figure(figsize=(10, 2.1 * sum(heights)), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    panels = []
    if has_loss:
        axes = figure.add_subplot(grid[0])
        axes.set_title("loss", loc="left", fontsize=10)
        _draw_loss(axes, rows)
        panels.append(axes)
    for line, keys in enumerate(lines, start=int(has_loss)):
        columns = len(keys) if keys is small else PER_LINE
        cells = grid[line].subgridspec(1, columns)
        for column, key in enumerate(keys):
            axes = figure.add_subplot(cells[column])
            title = names.get(key, key.removeprefix("val_").replace("_", " "))
            axes.set_title(title, loc="left", fontsize=10, parse_math=False)
            if keys is small:
                axes.plot(*_thin(*series(rows, key)), color=ACCENT, linewidth=1.3)
            else:
                _draw_held_out(axes, rows, key)
            axes.locator_params(axis="x", nbins=5)
            if keys is small and key != "grad_norm":
                axes.set_ylim(bottom=0)
            panels.append(axes)
    for axes in panels:
        axes.grid(color="#e8ebf0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#aab2bf")
        axes.tick_params(colors="#5b6577", labelsize=8)
        axes.margins(x=0.01)
    panels[0].set_xlabel("step", fontsize=9, color="#5b6577")
    target = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "heterodiff"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()
