"""Counts of the events on the test device, each with the line of heterodiff that caused it."""

import importlib.util
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

LAUNCH = "launch"  # a kernel
COPY = "copy"  # from the host's memory to the device
BLOCKING = "blocking copy"  # of those, each that is not both pinned and non-blocking: the host waits for it
FETCH = "fetch"  # from the device to the host's memory, without waiting
WAIT = "wait"  # the host waits until the device has finished

_spec = importlib.util.find_spec("heterodiff")
assert _spec is not None
assert _spec.origin is not None
PACKAGE = str(Path(_spec.origin).parent) + "/"
_MAIN = threading.main_thread().ident or 0


@dataclass(eq=False)
class Counts:
    """Events since counting began: (kind, operation, line) to how often."""

    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def total(self, kind: str) -> int:
        """Number of events of ``kind``."""
        return sum(count for (of, _, _), count in self.events.items() if of == kind)

    def lines(self, kind: str) -> Counter[str]:
        """Events of ``kind`` by line, as ``training/loop.py:187``."""
        found: Counter[str] = Counter()
        for (of, _, line), count in self.events.items():
            if of == kind:
                found[line] += count
        return found

    def operations(self, kind: str) -> Counter[str]:
        """Events of ``kind`` by operation, as ``aten.addmm.default``."""
        found: Counter[str] = Counter()
        for (of, name, _), count in self.events.items():
            if of == kind:
                found[name] += count
        return found

    @property
    def launches(self) -> int:
        return self.total(LAUNCH)

    @property
    def copies(self) -> int:
        return self.total(COPY)

    @property
    def blocking_copies(self) -> int:
        return self.total(BLOCKING)

    @property
    def waits(self) -> int:
        return self.total(WAIT)

    def report(self, most: int = 15) -> str:
        """Totals, then for each kind the lines that cause most of it."""
        text = []
        for kind in (WAIT, COPY, BLOCKING, FETCH, LAUNCH):
            text.append(f"{self.total(kind):7d} {kind}")
            text += [f"{count:11d} {line}" for line, count in self.lines(kind).most_common(most)]
        return "\n".join(text)


_watching: list[Counts] = []


@contextmanager
def watched() -> Iterator[Counts]:
    """Count what happens on the device in this block, in all threads; blocks may be nested."""
    counts = Counts()
    _watching.append(counts)
    try:
        yield counts
    finally:
        _watching.remove(counts)


def record(kind: str, operation: str) -> None:
    """Count one event; costs nothing where nobody counts."""
    if _watching:
        event = (kind, operation, line_of_heterodiff())
        for counts in _watching:
            counts.events[event] += 1


def line_of_heterodiff() -> str:
    """The innermost line of heterodiff that is running: ``file:line``, or ``elsewhere``.

    Gradients flow back in a thread of autograd, while the main thread stands at the call of ``backward``.
    """
    found = _innermost(sys._getframe())
    if found is None and threading.get_ident() != _MAIN:
        found = _innermost(sys._current_frames().get(_MAIN))
    return found or "elsewhere"


def _innermost(frame: FrameType | None) -> str | None:
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name[len(PACKAGE) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return None
