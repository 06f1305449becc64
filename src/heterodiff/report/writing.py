"""The report of a run: one self-contained HTML file that needs no network and prints well."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterodiff.errors import RunError
from heterodiff.lazy import loaded
from heterodiff.report import training
from heterodiff.report.content import Code, Report, Section
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import part_of, texts
from heterodiff.tasks import TASKS

if TYPE_CHECKING:
    from jinja2 import Template


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder from whatever the folder holds, and return its path.

    A section without data is left out; a damaged file is named at the top.

    Raises:
        RunError: ``run_dir`` is not a folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run folder; `heterodiff train` makes one")
    files = RunFiles(run_dir)
    tasks = (files.task, *TASKS.values())  # the run's own first; what has no data here is left out
    cards = [card for make in _each(task.cards for task in tasks) for card in make(files.evaluation)]
    sections = [
        Section("Final samples", [files.figure(files.folder.samples_picture, "Final samples")]),
        *(section for make in _each(task.report for task in tasks) for section in make(files)),
        training.curves(files),
        training.grids(files),
        training.machine(files),
        Section("Configuration", [Code(files.config, columns=True)]),
        training.reproduction(files),
    ]
    subtitle = f"Report of a heterodiff run · {training.device(files)}"
    report = Report(run_dir.resolve().name, subtitle, files.problems, [*cards, *training.cards(files)], sections)
    files.folder.write_text(files.folder.report_file, render(report))
    return files.folder.report_file


def _each(names: Iterable[str | None]) -> list[Callable[..., Any]]:
    return [loaded(name) for name in dict.fromkeys(names) if name]


def summary_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the main numbers of an evaluation, a line each, as the terminal shows them."""
    tables = [table for make in _each(task.metrics for task in TASKS.values()) for table in make(evaluation)]
    lines = [line for table in tables for line in table.lines()]
    for part in ("held_out", "data"):
        lines += [f"note     {note}" for note in texts(part_of(evaluation, part).get("notes"))]
    return [*lines, *(f"skipped  {key}: {reason}" for key, reason in part_of(evaluation, "skipped").items())]


def render(report: Report) -> str:
    """Return a report as an HTML document."""
    return _template().render(report=report)


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    source = resources("heterodiff.report").joinpath("report.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(source)
