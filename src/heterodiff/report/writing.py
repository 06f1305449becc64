"""The report of a run: one self-contained HTML file that needs no network and prints well."""

import platform
import re
import shlex
from collections.abc import Iterable
from functools import cached_property
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from heterodiff.config.file import read_yaml
from heterodiff.errors import HeterodiffError, RunError
from heterodiff.files import MAX_LIST_BYTES, parse_json, parse_rows, read_bytes
from heterodiff.lazy import loaded
from heterodiff.report import page
from heterodiff.report.curves import curves_svg, is_number, series
from heterodiff.report.formatting import part_of
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import TASKS, Task, task_of, task_of_recipe

PROMPTS_PICTURE = "evaluation/text_to_image.png"
CAPTIONS_PICTURE = "evaluation/image_to_text.png"
ANOMALIES_PICTURE = "evaluation/segmentation.png"
SHOWN_GRIDS = 6


class RunFiles:
    """What can be read of a run folder; files that cannot are named in ``problems``."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.problems: list[str] = []
        folder = self.folder = RunFolder(run_dir)
        self.config = self._content(folder.config_file).decode("utf-8", "replace")
        self.run = self._json(folder.machine_file)
        self.evaluation = self._json(folder.evaluation_file)
        self.augmentation = self._json(folder.augmentation_file)
        self.metrics = self._rows(folder.metrics_file)

    @cached_property
    def task(self) -> Task:
        """The task of the run; that of class images where its configuration does not say."""
        try:
            return task_of(self.folder.config())
        except (HeterodiffError, OSError):
            found = re.search(r"^recipe: ([\w-]+)$", self.config, re.MULTILINE)
            return task_of_recipe(found[1] if found else "")

    def codec_metrics(self) -> list[dict[str, Any]]:
        """Rows of the run that went before this one; none where its folder is not there."""
        if not self.task.first_stage:
            return []
        try:
            path = Path(read_yaml(self.folder.config_file)["codec"]["path"])
            # The saved path may be relative to where training was started.
            folders = [
                folder for folder in (path, self.run_dir / path.name) if RunFolder(folder).metrics_file.is_file()
            ]
        except (HeterodiffError, OSError, ValueError, TypeError, KeyError):
            return []
        return RunFiles(folders[0]).metrics if folders else []

    def _content(self, path: Path) -> bytes:
        if not path.exists():
            return b""
        try:
            return read_bytes(path, limit=MAX_LIST_BYTES)
        except HeterodiffError:
            self.problems.append(f"{path.name} could not be read; what it holds is missing here")
            return b""

    def _json(self, path: Path) -> dict[str, Any]:
        content = self._content(path)
        try:
            return parse_json(content, path.name) if content else {}
        except HeterodiffError:
            self.problems.append(f"{path.name} is not a JSON object; what it holds is missing here")
            return {}

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        rows, bad = parse_rows(self._content(path))
        if bad:
            self.problems.append(f"{path.name}: {bad} damaged {'line' if bad == 1 else 'lines'} left out")
        return [row for row in rows if row]

    def picture(self, name: str) -> bytes | None:
        """Return a PNG of the folder by its path in it, or None; a damaged one is named in ``problems``."""
        path = self.run_dir / name
        data = page.read_png(path)
        if data is None and path.is_file():
            self.problems.append(f"{path.name} is damaged or too large and is not shown")
        return data

    def grids(self) -> list[tuple[int, Path]]:
        """Return (step, path) of the grids drawn during training, in order of the steps."""
        found = []
        for path in self.folder.samples.glob("step_*.png"):
            match = re.fullmatch(r"step_(\d+)", path.stem)
            if match:
                found.append((int(match[1]), path))
        return sorted(found)


def _spread(items: list[Any], count: int) -> list[Any]:
    """Return ``count`` of ``items`` evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _device(files: RunFiles) -> str:
    device = str(files.run.get("device") or platform.machine())
    return re.sub(r"^1 CPU threads$", "1 CPU thread", device)


def _seconds(files: RunFiles) -> float | None:
    recorded = files.run.get("seconds")
    if is_number(recorded):
        return float(recorded)
    values = series(files.metrics, "seconds")[1]
    return values[-1] if values else None


def _training_cards(files: RunFiles) -> Iterable[tuple[str, str, str]]:
    steps, losses = series(files.metrics, "loss")
    if steps:
        last = losses[-min(len(losses), 20) :]
        yield "Training steps", f"{steps[-1]:,.0f}", f"loss {sum(last) / len(last):.4f} (last {len(last)} rows)"
    seconds = _seconds(files)
    speeds = series(files.metrics, "images_per_second")[1]
    if seconds is not None:
        yield "Training time", _duration(seconds), f"{median(speeds):,.0f} images/s" if speeds else ""
    parameters = files.run.get("parameters")
    if is_number(parameters):
        value = f"{parameters / 1e6:,.2f} M" if parameters >= 1e5 else f"{parameters:,}"
        yield "Parameters", value, str(files.run.get("model_summary", "")).split("\n")[0][:60]


def _grids_section(files: RunFiles) -> str:
    figures = []
    for step, path in _spread(files.grids(), SHOWN_GRIDS):
        data = page.read_png(path)
        if data is None:
            files.problems.append(f"samples/{path.name} is damaged and is not shown")
        figures.append(page.figure(data, "png", f"Samples at step {step}", f"step {step:,}", framed=True))
    strip = "\n".join(filter(None, figures))
    return page.section("Samples during training", f'<div class="strip">\n{strip}\n</div>' if strip else "")


def _curves_section(files: RunFiles) -> str:
    svg = curves_svg(files.metrics)
    text = "Noise levels are drawn at random, so single losses scatter: follow the mean."
    text = text if svg and files.task.scattered else ""
    stage = curves_svg(files.codec_metrics())
    return page.section(
        "Training curves",
        page.paragraph(f"{files.task.first_stage}, which were trained first:" if stage else ""),
        page.figure(stage, "svg+xml", "Training curves of the image codec and the text networks"),
        page.paragraph("The denoiser:" if stage and svg else ""),
        page.paragraph(text, "soft"),
        page.figure(svg, "svg+xml", "Training curves"),
    )


def _machine_section(files: RunFiles) -> str:
    run, rows = files.run, []
    seconds = _seconds(files)
    speeds = series(files.metrics, "images_per_second")[1]
    if seconds is not None:
        rows.append(("Training time", _duration(seconds)))
    if speeds:
        rows.append(("Images per second", f"{median(speeds):,.1f} (median), {max(speeds):,.1f} (best)"))
    if run.get("device"):
        rows.append(("Device", _device(files)))
    versions = run.get("versions")
    if isinstance(versions, dict):
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    names = run.get("class_names")
    if isinstance(names, list) and names:
        rows.append(("Classes", ", ".join(map(str, names))))
    summary = str(run.get("model_summary", ""))
    return page.section("Timing and machine", page.table((), rows), page.preformatted(summary))


def _reproduce_section(files: RunFiles) -> str:
    folder = shlex.quote(str(files.run_dir))
    config = shlex.quote(str(files.folder.config_file))
    draw = [command.format(run=folder) for command in files.task.reproduce]
    if part_of(files.evaluation, "mixed"):
        draw = [f"heterodiff segment {folder} --calibrate"]
    commands = [f"heterodiff train {config}", *draw, f"heterodiff evaluate {folder}"]
    text = "The saved configuration repeats the run; seeds make it exact on the same device and versions."
    original = files.run.get("command")
    if original:
        text += f" It was started with: {original}"
    return page.section("How to reproduce", page.paragraph(text), page.preformatted("\n".join(commands)))


def _tasks(files: RunFiles) -> Iterable[Task]:
    """All tasks, the run's own first: what is not there to show is left out, so a report needs not ask further."""
    return (files.task, *TASKS.values())


def _evaluation_cards(files: RunFiles) -> list[tuple[str, str, str]]:
    names = dict.fromkeys(task.cards for task in _tasks(files) if task.cards)
    return [card for name in names for card in loaded(name)(files.evaluation)]


def _evaluation_sections(files: RunFiles) -> list[str]:
    names = dict.fromkeys(task.report for task in _tasks(files) if task.report)
    return [section for name in names for section in loaded(name)(files)]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder from whatever the folder holds.

    Read are ``config.yaml``, ``run.json``, ``metrics.jsonl``, ``samples/step_*.png``, ``samples.png``,
    ``evaluation.json`` (see :func:`heterodiff.metrics.generation.evaluate_generation`),
    ``nearest.png``, ``augmentation.json`` (see :func:`heterodiff.metrics.augmentation.augmentation_study`),
    ``augmentation.png``, the pictures in ``evaluation``, and the ``metrics.jsonl`` of the alignment that a run of
    recipe text-image builds on; a section without data is left out, a damaged file is named at the top.

    Returns:
        The path of the report.

    Raises:
        RunError: ``run_dir`` is not a folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run folder; `heterodiff train` makes one")
    files = RunFiles(run_dir)
    samples = page.figure(files.picture("samples.png"), "png", "Final samples")
    name = run_dir.resolve().name
    sections = [
        page.cards([*_evaluation_cards(files), *_training_cards(files)]),
        page.section("Final samples", samples),
        *_evaluation_sections(files),
        _curves_section(files),
        _grids_section(files),
        _machine_section(files),
        page.section("Configuration", page.preformatted(files.config, "columns")),
        _reproduce_section(files),
    ]
    notices = [page.notice(problem) for problem in files.problems]
    header = [f"<h1>{escape(name)}</h1>", page.paragraph(f"Report of a heterodiff run · {_device(files)}", "soft")]
    document = page.page(f"{name} · heterodiff", [*header, *notices, *sections])
    files.folder.write_text(files.folder.report_file, document)
    return files.folder.report_file
