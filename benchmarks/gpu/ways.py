"""Rows that choose between several ways of computing the same: norms, and sparse attention."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.session import Bench, Row
from benchmarks.measure import ratio

MAPS = {"128x128, 128": (32, 128, 128), "32x32, 256": (32, 256, 32), "8x8, 512": (32, 512, 8)}
"""Batch, channels and side of maps of configuration B."""
ROUNDS = 10
GAIN = 1.03
"""A way is chosen in place of the present one if it is so many times faster."""


@contextmanager
def chosen_way(table: dict[str, str], key: str, way: str) -> Iterator[None]:
    """``way`` in a table of the package for a while."""
    before = dict(table)
    table[key] = way
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def norm_call(bench: Bench, batch: int, channels: int, side: int, way: str) -> Callable[[], None]:
    """Norm and SiLU of a channels-last bfloat16 map, forward and backward."""
    from heterodiff.models import normalization

    norm = normalization.GroupNorm32(channels).to(bench.device)
    x = torch.randn(batch, channels, side, side, device=bench.device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)

    def call() -> None:
        with chosen_way(normalization.NORM_WAYS, bench.device.type, way):
            normalization.norm_silu(x, norm).backward(grad)

    return call


def norms(bench: Bench) -> dict[str, Any]:
    """Time of ``tokens`` in units of ``kernel``, for single maps and for a training step of ``unet``, and the choice."""
    from benchmarks.gpu.speed import call_of
    from heterodiff.models.normalization import NORM_WAYS

    found: dict[str, Any] = {}
    for name, (batch, channels, side) in MAPS.items():
        shape = bench.size((batch, channels, side), (1, 32, 8))
        seconds = bench.times({way: norm_call(bench, *shape, way) for way in ("kernel", "tokens")}, ROUNDS, 10)
        found[name] = ratio(seconds, "tokens", "kernel")
    step = call_of(bench, "unet", "train", bench.size(32, 1), compiled=False)

    def with_way(way: str) -> None:
        with chosen_way(NORM_WAYS, bench.device.type, way):
            step()

    seconds = bench.times({way: partial(with_way, way) for way in ("kernel", "tokens")}, ROUNDS)
    found["unet, training step"] = of_step = ratio(seconds, "tokens", "kernel")
    best = "tokens" if of_step * GAIN < 1 else "kernel"
    return found | {"to_commit": f'NORM_WAYS["{bench.device.type}"] = "{best}"'}


def fastest(seconds: Mapping[str, list[float]]) -> str:
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


def rows() -> list[Row]:
    return [Row("norms", 40, norms)]
