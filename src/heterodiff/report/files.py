"""The files of a run folder that a report shows, read so that a damaged one is named and left out."""

import io
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from heterodiff.config.file import read_yaml
from heterodiff.errors import HeterodiffError
from heterodiff.files import MAX_LIST_BYTES, parse_json, parse_rows, read_bytes
from heterodiff.report.content import Figure
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import Task, task_of, task_of_recipe

MAX_PICTURE_BYTES = 20_000_000


class RunFiles:
    """Readable content of a run folder; files that cannot be read are named in ``problems``."""

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
        """The task of the run; that of class images where its configuration is damaged."""
        try:
            return task_of(self.folder.config())
        except (HeterodiffError, OSError):
            found = re.search(r"^recipe: ([\w-]+)$", self.config, re.MULTILINE)
            return task_of_recipe(found[1] if found else "")

    def codec_metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl`` of the run that trained the codec; none where its folder is not there."""
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
            self.problems.append(f"{path.name} could not be read; its content is missing here")
            return b""

    def _json(self, path: Path) -> dict[str, Any]:
        content = self._content(path)
        try:
            return parse_json(content, path.name) if content else {}
        except HeterodiffError:
            self.problems.append(f"{path.name} is not a JSON object; its content is missing here")
            return {}

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        rows, bad = parse_rows(self._content(path))
        if bad:
            self.problems.append(f"{path.name}: {bad} damaged {'line' if bad == 1 else 'lines'} left out")
        return [row for row in rows if row]

    def figure(self, path: Path, alt: str, caption: str = "", framed: bool = False) -> Figure:
        """Return a PNG of the folder; without data where there is none or, named in ``problems``, a damaged one."""
        data = _read_png(path)
        if data is None and path.is_file():
            self.problems.append(f"{path.name} is damaged or too large and is not shown")
        return Figure(data, alt, caption, framed)

    def grids(self) -> list[tuple[int, Path]]:
        """Return (step, path) of the grids drawn during training, in order of the steps."""
        matches = ((re.fullmatch(r"step_(\d+)", path.stem), path) for path in self.folder.samples.glob("step_*.png"))
        return sorted((int(match[1]), path) for match, path in matches if match)


def _read_png(path: Path) -> bytes | None:
    """Return the bytes of a PNG that can be shown: there, of sensible size, complete; else None."""
    from PIL import Image

    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return None
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return data
