"""Numbers that the project promises, and whether a run of a benchmark kept them."""

from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 0.1
"""A timing may miss its promise by this share before the benchmark fails."""


@dataclass(frozen=True)
class Promise:
    """``value``, measured, shall be ``at_least`` or ``at_most`` something."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def shortfall(self) -> float:
        """By which share the promise is missed; at most 0 where it is kept."""
        if self.at_least is not None:
            return 1 - self.value / self.at_least
        assert self.at_most is not None
        return self.value / self.at_most - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kept": self.shortfall <= 0}


def report(promises: list[Promise]) -> int:
    """Print each promise with its number; 1 if one is missed by more than ``TOLERANCE``, else 0."""
    for p in promises:
        word = "kept" if p.shortfall <= 0 else "near" if p.shortfall <= TOLERANCE else "MISSED"
        limit = f">= {p.at_least:g}" if p.at_least is not None else f"<= {p.at_most:g}"
        print(f"{word:6} {p.name:52} {p.value:8.3f}  promised {limit}")
    missed = [p for p in promises if p.shortfall > TOLERANCE]
    if missed:
        print(f"FAILED: {len(missed)} of {len(promises)} promises missed by more than {TOLERANCE:.0%}")
    return 1 if missed else 0
