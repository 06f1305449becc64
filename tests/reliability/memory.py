"""Peak memory of a part of a test."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """``megabytes`` that were in use at once beyond those at the beginning; 0 where the system does not tell."""

    megabytes = 0.0


def _status(key: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the resident memory of this process, on Linux, whose kernel can forget earlier peaks."""
    peak = Peak()
    gc.collect()
    try:
        CLEAR.write_text("5")
        before = _status("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.megabytes = _status("VmHWM") - before
