"""Work of one call that several processes share, as torchrun starts them."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from heterodiff.devices import LONGEST_WAIT, process_count, process_state

T = TypeVar("T")


class Team:
    """The processes that share the work of a call; one alone unless more have joined.

    Attributes:
        rank: of this process; the first one, 0, gets all results.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None):
        self.rank, self.count, self._group = rank, count, group

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Return the part of ``items`` that this process works on."""
        return items[self.rank :: self.count]

    def each(self, items: int, most: int) -> int:
        """Return how many of ``items`` to work on at once, at most ``most``, so that every process has some."""
        return max(1, min(most, -(-items // self.count)))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._group is not None:
            dist.barrier(self._group)

    def collect(self, results: Iterable[T]) -> list[T]:
        """Return the results of all processes in the order of their items, in the first one, which goes on alone.

        Raises:
            SystemExit: in the other processes, whose work is done.
        """
        own = list(results)
        if self.count == 1:
            return own
        found: list[list[T]] | None = [[] for _ in range(self.count)] if self.rank == 0 else None
        dist.gather_object(own, found, group=self._group)
        count = self.count
        self.first_alone()
        assert found is not None
        return [found[k % count][k // count] for k in range(sum(map(len, found)))]

    def first_alone(self) -> None:
        """Leave work that is not shared to the first process.

        Raises:
            SystemExit: in the other processes.
        """
        if self.count == 1:
            return
        process_state().destroy_process_group()  # metrics would wait for the others, which are gone
        if self.rank > 0:
            raise SystemExit(0)
        self.count, self._group = 1, None


_team = Team()


def team() -> Team:
    """Return the processes that share the work of this call."""
    return _team


def join() -> Team:
    """Let the processes that were started together share the work of this call; each has a device of its own.

    Results go through the hosts' network, so that waiting for a slow process does not end in a timeout of devices.
    """
    global _team
    if process_count() > 1 and _team.count == 1:
        state = process_state()
        group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        _team = Team(state.process_index, state.num_processes, group)
    return _team
