"""Random damage to every kind of input: a worded error or a usable result, from fixed seeds."""

import os
from pathlib import Path

import pytest

from tests.reliability.fuzzing import TARGETS, Case

CASES = int(os.environ.get("HETERODIFF_FUZZ_CASES", "40"))
CRASHED = [("deflated tif", 11), ("npz", 93), ("npz", 162), ("npz", 361), ("torch file", 397), ("torch file", 435)]
"""Cases that were tracebacks once."""


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    seeds = [*range(CASES), *(seed for kind, seed in CRASHED if kind == name)]
    problems = {seed: problem for seed in seeds if (problem := case.run(seed)) is not None}
    assert problems == {}
