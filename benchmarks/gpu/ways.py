"""Rows that choose between several ways of computing the same: norms, and sparse attention."""

import copy
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.session import Bench, Row, Unexpected
from benchmarks.measure import ratio

MAPS = {"128x128, 128": (32, 128, 128), "32x32, 256": (32, 256, 32), "8x8, 512": (32, 512, 8)}
"""Batch, channels and side of maps of configuration B."""
ROUNDS = 10
SIDES, HEAD_WIDTHS = (32, 64, 96, 128), (16, 32, 64)
MAX_KEYS = 512
"""Keys of a query at most, as in the networks."""
ROUNDING = 0.05
"""Difference of two ways in bfloat16, in units of the largest value."""
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
    """Time of ``tokens`` in units of ``kernel``, of single maps and of a training step of ``unet``; and the choice."""
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


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """float32 products of precision ``name`` (torch's: highest, high) for a while; TF32 is ``high``."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(name)
    torch.backends.cudnn.allow_tf32 = name == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def tf32(bench: Bench) -> dict[str, Any]:
    """A float32 training step of ``unet`` with TF32, in units of that without, and how far outputs differ."""
    from benchmarks.gpu.speed import arguments, network
    from benchmarks.networks import train

    unet, given = network(bench, "unet").train(), arguments(bench, "unet", bench.size(8, 1))

    def within(name: str, call: Callable[..., Any]) -> Any:
        with product_precision(name):
            return call(unet, *given)

    seconds = bench.times({name: partial(within, name, train) for name in ("highest", "high")}, ROUNDS)
    unet = copy.deepcopy(unet).eval()
    with torch.no_grad():
        for parameter in unet.parameters():  # the output begins as zeros, which no rounding changes
            if not parameter.any():
                parameter.normal_(std=0.02)
        exact, rounded = (within(name, lambda network, *x: network(*x)) for name in ("highest", "high"))
    difference = float((exact - rounded).abs().max() / exact.abs().max())
    return {"training step": ratio(seconds, "high", "highest"), "largest_difference": difference}


def attention_call(bench: Bench, side: int, head_width: int, way: str) -> Callable[[], torch.Tensor]:
    """Sparse attention of maps of ``side`` x ``side``, forward and backward, computed in ``way``; returns answers."""
    from heterodiff.models.attention.patterns import Grid, make_pattern
    from heterodiff.models.attention.ways import DevicePattern, sparse_attention
    from heterodiff.models.hybrid import NUM_HEADS, REGIONAL_PATCHES

    grid = Grid(side, side, REGIONAL_PATCHES)
    placed = DevicePattern.place(make_pattern("multiscale", grid, 0.9, MAX_KEYS, 0), bench.device, way)
    width, batch = NUM_HEADS * head_width, bench.size(8, 1)
    torch.manual_seed(0)
    shapes = (batch, grid.local, width), (batch, grid.length, 2 * width)
    q, kv = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    grad = torch.randn_like(q)

    def call() -> torch.Tensor:
        out = sparse_attention(q, kv, placed, NUM_HEADS)
        torch.autograd.grad(out, (q, kv), grad)
        return out.detach()

    return call


def working_ways(bench: Bench, side: int, head_width: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The ways that the device can compute, each called once, and why it cannot compute the others.

    Raises:
        Unexpected: two ways differ by more than their rounding.
    """
    calls: dict[str, Callable[[], Any]] = {"gather": attention_call(bench, side, head_width, "gather")}
    expected, why = calls["gather"]().float(), {}
    for way in ("dense",) if bench.device.type == "cpu" else ("dense", "flex"):  # flex has no gradients on a CPU
        try:
            call = attention_call(bench, side, head_width, way)
            found = call().float()
        except Exception as error:  # no memory or no kernel; there are the others to choose from
            why[way] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        calls[way] = call
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= ROUNDING:
            raise Unexpected(f"{way} differs from gather by {difference:.3g} at {side}x{side}, head {head_width}")
    return calls, why


def attention(bench: Bench, side: int) -> dict[str, Any]:
    """Milliseconds of each way by the width of a head, and rows for the table that chooses among them."""
    from heterodiff.models.attention.patterns import Grid
    from heterodiff.models.hybrid import REGIONAL_PATCHES

    torch.compiler.reset()  # compiled for too many shapes, flex would go on uncompiled
    side = bench.size(side, 24)
    length = Grid(side, side, REGIONAL_PATCHES).length
    found: dict[str, Any] = {}
    choices = []
    for head_width in bench.size(HEAD_WIDTHS, HEAD_WIDTHS[:1]):
        calls, why = working_ways(bench, side, head_width)
        seconds = bench.times(calls, ROUNDS)
        found[f"head {head_width}"] = {w: 1000 * statistics.median(values) for w, values in seconds.items()} | why
        relative = {way: ratio(seconds, way, "gather") for way in seconds}
        best = min(relative, key=relative.__getitem__)
        way = best if relative[best] * GAIN < 1 else "gather"
        choices.append({"device": bench.device.type, "length": length, "head_width": head_width, "way": way})
    return found | {"choices": choices}


def attention_table(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The content of ``ways.json`` by what was measured; None where nothing was."""
    from heterodiff.models.attention.patterns import DENSE_LIMIT
    from heterodiff.models.attention.ways import way_rows

    chosen = [choice for row in rows.values() for choice in row.get("found", {}).get("choices", [])]
    if not chosen:
        return None
    device = chosen[0]["device"]
    chosen.sort(key=lambda row: (row["length"], row["head_width"]))  # the first row that fits counts
    first = {"device": device, "length": DENSE_LIMIT, "head_width": None, "way": "dense"}
    others = [row for row in way_rows() if row["device"] != device]
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in [first, *chosen, *others]) + "\n]"


def rows() -> list[Row]:
    return [
        Row("norms", 40, norms),
        Row("TF32", 15, tf32),
        *(Row(f"attention {side}x{side}", 60, partial(attention, side=side)) for side in SIDES),
    ]
