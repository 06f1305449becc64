"""Runs that benchmarks train."""

import json
from pathlib import Path

from heterodiff.config import RunConfig
from heterodiff.training.start import train

ROOT = Path(__file__).parents[1]


def to_the_end(config: RunConfig) -> int:
    """Train the run, or go on with it; its number of steps. A signal ends the benchmark: numbers are of whole runs."""
    result = train(config)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    return result.step


def seconds_of(run: Path) -> float:
    """Seconds of training, over all parts of an interrupted run."""
    return json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["seconds"]
