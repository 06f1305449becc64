"""The parts of a report that every run has: training, timing, machine, and how to repeat it."""

import platform
import re
import shlex
from collections.abc import Iterable
from statistics import median

from heterodiff.progress import duration
from heterodiff.report.content import Block, Card, Code, Figure, Section, Strip, Table, Text
from heterodiff.report.curves import curves_svg, series
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import is_number, part_of

SHOWN_GRIDS = 6


def cards(files: RunFiles) -> Iterable[Card]:
    """Yield the headline numbers of the training."""
    steps, losses = series(files.metrics, "loss")
    if steps:
        last = losses[-20:]
        yield Card("Training steps", f"{steps[-1]:,.0f}", f"loss {sum(last) / len(last):.4f} (last {len(last)} rows)")
    seconds = _seconds(files)
    speeds = series(files.metrics, "images_per_second")[1]
    if seconds is not None:
        yield Card("Training time", duration(seconds), f"{median(speeds):,.0f} images/s" if speeds else "")
    parameters = files.run.get("parameters")
    if is_number(parameters):
        value = f"{parameters / 1e6:,.2f} M" if parameters >= 1e5 else f"{parameters:,}"
        yield Card("Parameters", value, str(files.run.get("model_summary", "")).split("\n")[0][:60])


def grids(files: RunFiles) -> Section:
    """Samples drawn during training: six grids at most, evenly spread, the first and the last among them."""
    found = files.grids()
    if len(found) > SHOWN_GRIDS:
        found = [found[round(k * (len(found) - 1) / (SHOWN_GRIDS - 1))] for k in range(SHOWN_GRIDS)]
    figures = [files.figure(path, f"Samples at step {step}", f"step {step:,}", framed=True) for step, path in found]
    return Section("Samples during training", [Strip(figures)])


def curves(files: RunFiles) -> Section:
    """Curves of the run, after those of the networks that were trained first."""
    own, first = (
        Figure(curves_svg(rows), "Training curves", kind="svg+xml") for rows in (files.metrics, files.codec_metrics())
    )
    text = "Noise levels are drawn at random, so single losses scatter: follow the mean."
    blocks: list[Block] = [Text(text if own.data and files.task.scattered else "", soft=True), own]
    if first.data:
        before = Text(f"{files.task.first_stage}, which were trained first:")
        blocks = [before, first, Text("The denoiser:" if own.data else ""), *blocks]
    return Section("Training curves", blocks)


def machine(files: RunFiles) -> Section:
    """Speed, device, versions, classes and network."""
    run = files.run
    rows = []
    seconds = _seconds(files)
    speeds = series(files.metrics, "images_per_second")[1]
    if seconds is not None:
        rows.append(("Training time", duration(seconds)))
    if speeds:
        rows.append(("Images per second", f"{median(speeds):,.1f} (median), {max(speeds):,.1f} (best)"))
    if run.get("device"):
        rows.append(("Device", device(files)))
    versions, names = run.get("versions"), run.get("class_names")
    if isinstance(versions, dict):
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if isinstance(names, list) and names:
        rows.append(("Classes", ", ".join(map(str, names))))
    return Section("Timing and machine", [Table((), rows), Code(str(run.get("model_summary", "")))])


def reproduction(files: RunFiles) -> Section:
    """Commands that repeat the run and its evaluation."""
    folder = shlex.quote(str(files.run_dir))
    use = [command.format(run=folder) for command in files.task.reproduce]
    if part_of(files.evaluation, "mixed"):
        use = [f"heterodiff segment {folder} --calibrate"]
    config = shlex.quote(str(files.folder.config_file))
    commands = [f"heterodiff train {config}", *use, f"heterodiff evaluate {folder}"]
    text = "The saved configuration repeats the run; seeds make it exact on the same device and versions."
    if original := files.run.get("command"):
        text += f" It was started with: {original}"
    return Section("How to reproduce", [Text(text), Code("\n".join(commands))])


def device(files: RunFiles) -> str:
    """The device that the run was trained on; this machine's kind where that is unknown."""
    found = str(files.run.get("device") or platform.machine())
    return re.sub(r"^1 CPU threads$", "1 CPU thread", found)


def _seconds(files: RunFiles) -> float | None:
    recorded = files.run.get("seconds")
    if is_number(recorded):
        return float(recorded)
    values = series(files.metrics, "seconds")[1]
    return values[-1] if values else None
