"""Progress of an evaluation on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 15.0  # between progress lines where there is no terminal
BATCH_SIZES = {"cpu": 20}  # small, so that progress is seen; a GPU wants more at once
BATCH_SIZE = 100

StartTask = Callable[[str, int], Callable[[int], None]]


def pictures_at_once(device: torch.device | str) -> int:
    """How many pictures to draw between two reports of progress."""
    return BATCH_SIZES.get(torch.device(device).type, BATCH_SIZE)


@contextmanager
def progress_tasks() -> Iterator[StartTask]:
    """Yield a function that starts a task of so many items and returns what to call with the number done.

    A bar on a terminal, else a line every quarter of a minute and at the end of each task.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )

    def start(name: str, total: int) -> Callable[[int], None]:
        task = bar.add_task(name, total=total, speed="")
        began = shown = time.perf_counter()

        def done(count: int) -> None:
            nonlocal shown
            now = time.perf_counter()
            speed = f"{count / max(now - began, 1e-9):.3g}/s"
            bar.update(task, completed=count, speed=speed)
            if bar.disable and (now - shown >= LINE_SECONDS or count == total):
                shown = now
                print(f"{name}: {count:,} of {total:,}, {speed}", file=sys.stderr, flush=True)

        return done

    with bar:
        yield start
