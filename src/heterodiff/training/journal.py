"""Reports of a run while it trains: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from heterodiff.progress import duration, progress_bar
from heterodiff.run_folder import RunFolder


class StepClock:
    """Time spent on training steps, and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.steps = 0
        self.waited = 0.0

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


class EventFiles:
    """Rows and pictures for TensorBoard, a view that a run can do without: it goes on where they cannot be written.

    Args:
        step: first step; what an earlier part of the run has written from there on is not shown.
        say: prints a line.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self._say = say
        self._writer: Any = None
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        with self._spared():
            self._writer = SummaryWriter(str(folder), purge_step=step)

    @contextmanager
    def _spared(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._say(f"note     TensorBoard's files cannot be written ({error.strerror}); the run goes on without")

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Say nothing of the thread that writes: the next call raises its error again."""
        if not type(failed.thread).__module__.startswith("tensorboard"):
            self._hook(failed)

    def row(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            with self._spared():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def picture(self, step: int, image: Any) -> None:
        """Add a PIL ``image``."""
        if self._writer is not None:
            import numpy as np

            with self._spared():
                self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            with self._spared():
                self._writer.close()
        threading.excepthook = self._hook


class Journal:
    """Rows of numbers by step, to file and screen.

    Args:
        steps: total steps of the run.
        step: steps that are done; later rows of an interrupted run are removed, they will be written again.
        tensorboard: also write event files to ``tensorboard/``.
        quiet: print nothing.
        writes: False for all but one of several processes: write no files either.

    Attributes:
        validated: steps that an interrupted run has validated.
    """

    def __init__(self, run: RunFolder, steps: int, step: int, tensorboard: bool, quiet: bool, writes: bool = True):
        self.run, self.steps, self.writes = run, steps, writes
        quiet = quiet or not writes
        self.validated: set[Any] = set()
        self._seconds_before = self._forget_after(step)
        self._start = time.perf_counter()
        self.console = Console(stderr=True, quiet=quiet)
        self._events = EventFiles(run.path / "tensorboard", step + 1, self.say) if tensorboard and writes else None
        self._bar = progress_bar(self.console, quiet, transient=False)
        self._task = self._bar.add_task("training", total=steps, completed=step, note="")

    def __enter__(self) -> "Journal":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._events is not None:
            self._events.close()

    def _forget_after(self, step: int) -> float:
        """Remove the rows after ``step``; return the seconds of training up to it."""
        kept = [row for row in self.run.metrics()[0] if row.get("step", 0) <= step]
        self.validated = {row.get("step") for row in kept if "loss" not in row}
        if self.writes:
            self.run.write_text(self.run.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))
        return max((row.get("seconds", 0.0) for row in kept), default=0.0)

    @property
    def seconds(self) -> float:
        """Seconds of training, over all parts of an interrupted run."""
        return self._seconds_before + time.perf_counter() - self._start

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def row(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` of ``step`` (1-based)."""
        if not self.writes:
            return
        with self.run.writing(self.run.metrics_file), self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values, "seconds": round(self.seconds, 3)}) + "\n")
        if self._events is not None:
            self._events.row(step, values)
        if "loss" in values:
            note = f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"
            self._bar.update(self._task, note=note)
            if self._bar.disable:
                left = self.seconds / step * (self.steps - step)
                self.console.print(f"step {step}/{self.steps}  {note}  about {duration(left)} left", highlight=False)

    def note(self, text: str) -> None:
        """Show ``text`` beside the progress bar."""
        self._bar.update(self._task, note=text)

    def picture(self, step: int, image: Any) -> None:
        """Record a PIL ``image`` in TensorBoard."""
        if self._events is not None:
            self._events.picture(step, image)

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False)
