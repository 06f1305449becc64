"""Rows of measurements one after the other, each written down before the next begins."""

import gc
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu.table import head_of
from benchmarks.measure import interleaved, write_results

ROOT = Path(__file__).parents[2]
FINAL = ("done", "failed")
"""States in which a row of the same code is not measured again."""
OURS = ("heterodiff", "benchmarks", "tests")
SHORTEST = 5.0
"""Seconds below which no row is begun."""


class Unavailable(Exception):
    """The device or the machine lacks what a row measures."""


class Unexpected(Exception):
    """A check of a row came out wrong."""


class OutOfTime(BaseException):
    """The time is up; no ``except Exception`` within a row takes it for an error of its own."""


class DeviceLost(Exception):
    """The device answers no more; only a new process gets it back."""


def own_environment() -> dict[str, str]:
    """The environment of a new process that imports this code, wherever it runs."""
    path = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def error_of(stderr: str) -> Exception:
    """The error that ended another process, by what it printed; a library that it lacked makes a row unavailable."""
    last = (stderr.strip() or "no message").splitlines()[-1]
    return Unavailable(last) if last.startswith("ModuleNotFoundError") else RuntimeError(last)


@dataclass(frozen=True)
class Bench:
    """What rows measure on.

    Attributes:
        device: the one that is measured.
        tiny: the smallest sizes, to see that every row works.
        folder: for runs, shared by the rows and removed in the end.
        networks: networks that were built already, by name.
    """

    device: torch.device
    tiny: bool
    folder: Path
    networks: dict[str, Any] = field(default_factory=dict)

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def times(self, calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
        """Seconds of ``repeats`` times each call, in each round; the calls take turns."""

        def finished(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> None:
                for _ in range(repeats):
                    call()
                self.wait()

            return run

        rounds, warmup = (1, 0) if self.tiny else (rounds, 2)
        return interleaved({name: finished(call) for name, call in calls.items()}, rounds, warmup)

    def peak_mb(self, call: Callable[[], object]) -> float | None:
        """The most memory of the device that ``call`` takes beside what is taken already; None on a CPU."""
        if self.device.type == "cpu":
            call()
            return None
        self.wait()
        torch.accelerator.reset_peak_memory_stats(self.device)
        before = torch.accelerator.memory_allocated(self.device)
        call()
        self.wait()
        return (torch.accelerator.max_memory_allocated(self.device) - before) / 1e6


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: of the row, in results and for ``--rows``.
        seconds: how long it takes on a GPU, about.
        measure: what was found, by name.
    """

    name: str
    seconds: float
    measure: Callable[[Bench], dict[str, Any]]


def code_version() -> str:
    """The commit; where the code differs from it, or there is no git, the first digits of a hash of the code."""
    sources = [path for part in ("src", "benchmarks") for path in sorted((ROOT / part).rglob("*.py"))]
    try:
        commands = (["git", "status", "--porcelain", "src", "benchmarks"], ["git", "rev-parse", "HEAD"])
        changed, commit = (
            subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        changed = commit = ""
    if commit and not changed:
        return commit
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    return f"code {digest[:12]}"


@dataclass
class Results:
    """The rows of one device in a file, as they are known.

    Attributes:
        device: name of the device.
        folder: of the file.
        version: of the code that measures now.
    """

    device: str
    folder: Path
    version: str

    @property
    def name(self) -> str:
        return "gpu_" + re.sub(r"[^a-z0-9]+", "_", self.device.lower()).strip("_")

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        path = self.folder / f"{self.name}.json"
        return json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else {}

    def has(self, name: str) -> bool:
        """Whether ``name`` was measured with this version of the code."""
        row = self.rows.get(name, {})
        return row.get("version") == self.version and row["state"] in FINAL

    def forget(self, names: list[str]) -> None:
        for name in names:
            self.rows.pop(name, None)

    def keep(self, name: str, row: dict[str, Any]) -> Path:
        """Write ``row`` down before anything else happens."""
        self.rows[name] = row | {"version": self.version}
        return write_results(self.name, {"device": self.device, "rows": self.rows}, self.folder)


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise :class:`OutOfTime` in what takes longer, where the system can; None: no limit."""
    if seconds is None or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(row: Row, bench: Bench, seconds: float | None) -> dict[str, Any]:
    """The result of ``row``: its state (done, failed, skipped, cut), and what was found or why there is nothing."""
    start = time.perf_counter()
    try:
        with at_most(seconds):
            found = row.measure(bench)
        bench.wait()  # errors of the device come late
        result: dict[str, Any] = {"state": "done", "found": found}
    except Unavailable as error:
        result = {"state": "skipped", "why": _line(error)}
    except ImportError as error:
        ours = (error.name or "").partition(".")[0] in OURS
        result = {"state": "failed" if ours else "skipped", "why": _line(error)}
    except OutOfTime:
        result = {"state": "cut", "why": f"not finished after {seconds:.0f} s"}
    except Exception as error:
        result = {"state": "failed", "why": f"{type(error).__name__}: {_line(error)}"}
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _tidy(bench: Bench) -> None:
    """Free what the last row took.

    Raises:
        DeviceLost: the device does not answer.
    """
    gc.collect()
    if bench.device.type == "cpu":
        return
    try:
        torch.zeros(1, device=bench.device).add_(1).item()
        torch.accelerator.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(_line(error)) from None


def run_rows(rows: list[Row], bench: Bench, results: Results, minutes: float | None) -> list[str]:
    """Measure ``rows`` that are not known yet, as far as the time goes; names of those that it was too short for.

    Raises:
        DeviceLost: after a row, which is kept.
    """
    end = None if minutes is None else time.perf_counter() + 60 * minutes
    late = []
    for row in rows:
        if results.has(row.name):
            continue
        left = None if end is None else end - time.perf_counter()
        if left is not None and left < max(row.seconds, SHORTEST):
            late.append(row.name)
            continue
        result = measure(row, bench, left)
        results.keep(row.name, result)
        print(head_of(row.name, result), flush=True)
        _tidy(bench)
    return late
