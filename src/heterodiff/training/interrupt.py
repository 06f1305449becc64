"""Stopping between two steps when asked by a signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """Validation or a preview was given up because a signal asked to stop."""


def ignore_signals(_: int) -> None:
    """Let a loader worker outlive a signal to the whole group of processes, as schedulers and terminals send it.

    The main process needs its workers until the step is done, and ends them itself. If it is killed, they notice: a
    worker of torch looks for its parent every few seconds.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Remember SIGTERM and SIGINT until the loop stops between two steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.signal = number

    def raise_if_asked(self) -> None:
        """Raise :class:`Interrupted` if a signal has arrived."""
        if self.signal is not None:
            raise Interrupted

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        before = {n: signal.signal(n, self._handle) for n in STOPPING}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
