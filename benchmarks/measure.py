"""Timing that survives a noisy machine: everything that is compared takes turns in one run."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each round. All calls take turns, so that whatever slows the machine slows them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + warmup):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if k >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """How many times longer ``name`` takes than ``base``: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def matrix_product() -> None:
    """Ten float32 products of 2048x2048 matrices, ``MATRIX_GFLOP`` in all: what this machine can do at most."""
    a, b = (torch.ones(2048, 2048) for _ in range(2))
    for _ in range(10):
        a @ b


MATRIX_GFLOP = 10 * 2 * 2048**3 / 1e9


def peak_memory_mb(module: str, *arguments: str) -> float:
    """What ``python -m module arguments`` prints: its own peak in MB."""
    command = [sys.executable, "-m", module, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def machine() -> dict[str, Any]:
    """What was measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.machine()
    return {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_results(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write NAME.json in ``folder``, all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n", "utf-8")
    os.replace(unfinished, path)
    return path
