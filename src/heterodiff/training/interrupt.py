"""Stopping between two steps when asked by a signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Work that may be given up at any time was given up because a stop was asked for."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish that the loop honours between two steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.signal = number

    def raise_if_asked(self) -> None:
        """Raise :class:`Interrupted` if a stop was asked for."""
        if self.signal is not None:
            raise Interrupted

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        before = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
