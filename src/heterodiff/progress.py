"""Progress of long work on stderr, a bar on a terminal, else a line now and then; and how long something took."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 15.0
"""Time between two lines without a terminal."""


def duration(seconds: float) -> str:
    """Format a length of time: ``0.035 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min`` or ``3 d 4 h``."""
    if seconds < 9.95:
        return f"{round(seconds, 4):.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


StartTask = Callable[[str, int], Callable[[int], None]]


def progress_bar(console: Console, quiet: bool = False, transient: bool = True) -> Progress:
    """Return a progress bar; its tasks have a field ``note`` beside the count.

    Args:
        quiet: no bar; there is none without a terminal either.
        transient: remove the bar when it is done.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not sys.stderr.isatty(),
        transient=transient,
    )


@contextmanager
def progress_tasks(quiet: bool = False) -> Iterator[StartTask]:
    """Yield a function that starts a task of a number of items and returns what to call with the number done.

    A bar on a terminal, else a line every quarter of a minute and at the end of each task.
    """
    console = Console(stderr=True, quiet=quiet)
    bar = progress_bar(console, quiet)

    def start(name: str, total: int) -> Callable[[int], None]:
        task = bar.add_task(name, total=total, note="")
        began = shown = time.perf_counter()

        def done(count: int) -> None:
            nonlocal shown
            now = time.perf_counter()
            speed = f"{count / max(now - began, 1e-9):.3g}/s"
            bar.update(task, completed=count, note=speed)
            if bar.disable and (now - shown >= LINE_SECONDS or count == total):
                shown = now
                console.print(f"{name}: {count:,} of {total:,}, {speed}", highlight=False, markup=False, soft_wrap=True)

        return done

    with bar:
        yield start
