"""Rows of speed: configuration B beside other networks, and what the device does at most."""

import copy
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.session import Bench, Row
from benchmarks.measure import ratio

BATCHES = (32, 8, 1)
OURS, PEERS = ("unet", "hae-v2"), {"diffusers": ("diffusers",), "MONAI": ("monai", "einops")}
"""Networks, and what the others need."""
LAST = ", channels-last"
PRODUCT = "matrix product"
ROUNDS, REPEATS = 10, 3


def matrix_product(bench: Bench) -> tuple[Callable[[], object], float]:
    """A bfloat16 product of two large matrices of random numbers, and its FLOP."""
    side = bench.size(8192, 64)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


def available_peers() -> tuple[list[str], dict[str, str]]:
    """Other networks that can be built here, and what the rest needs."""
    missing = {name: [m for m in modules if importlib.util.find_spec(m) is None] for name, modules in PEERS.items()}
    there = [name for name in PEERS if not missing[name]]
    return there, {name: f"needs {', '.join(modules)}" for name, modules in missing.items() if modules}


def network(bench: Bench, name: str) -> nn.Module:
    """A network of configuration B on the device, in float32; built once."""
    from benchmarks.networks import B, Scale, build

    if name not in bench.networks:
        scale = bench.size(B, Scale(16, 32, (1, 2), (False, True), 32))
        made = build(name.removesuffix(LAST), scale).to(bench.device)
        bench.networks[name] = made.to(memory_format=torch.channels_last) if name.endswith(LAST) else made
    return bench.networks[name]


def arguments(bench: Bench, name: str, batch: int) -> list[Tensor]:
    from benchmarks.networks import SIZE, inputs

    x, *rest = (tensor.to(bench.device) for tensor in inputs(batch, bench.size(SIZE, 16)))
    return [x.contiguous(memory_format=torch.channels_last) if name.endswith(LAST) else x, *rest]


def call_of(bench: Bench, name: str, kind: str, batch: int, compiled: bool) -> Callable[[], None]:
    """One forward pass in bfloat16 as in sampling, or one training step under autocast, without the optimiser."""
    from benchmarks.networks import forward, train

    given = arguments(bench, name, batch)
    if kind == "forward":
        module = copy.deepcopy(network(bench, name)).to(torch.bfloat16).eval()
        given[0] = given[0].to(torch.bfloat16)
    else:
        module = network(bench, name).train()
    backend = "aot_eager" if bench.tiny else "inductor"  # without the compiler, which takes minutes
    run = torch.compile(module, dynamic=False, backend=backend) if compiled else module
    if kind == "forward":
        return lambda: forward(run, *given)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            train(run, *given)

    return step


def flop(bench: Bench, name: str, kind: str, batch: int) -> float:
    """Of one call; a training step takes that of three forward passes."""
    from heterodiff.models.profile import count_flops

    once = count_flops(network(bench, name), *arguments(bench, name, 1))
    return float(once * batch * (1 if kind == "forward" else 3))


def configuration_b(bench: Bench, batch: int, kind: str, compiled: bool) -> dict[str, Any]:
    """Time, ratio to ``unet``, share of the rate of a large matrix product and peak memory of each network."""
    torch.compiler.reset()
    batch = bench.size(batch, 1)
    peers, missing = available_peers()
    names = [*OURS, *peers, *(() if compiled else (peer + LAST for peer in peers))]
    if compiled:
        names = bench.size(names, ["unet"])
    calls = {name: call_of(bench, name, kind, batch, compiled) for name in names}
    if compiled:
        calls["unet, eager"] = call_of(bench, "unet", kind, batch, False)
    for call in calls.values():
        call()  # compiles it, or finds its kernels
    peaks = {name: bench.peak_mb(call) for name, call in calls.items()}
    calls[PRODUCT], product_flop = matrix_product(bench)
    seconds = bench.times(calls, ROUNDS, REPEATS)
    once = {name: statistics.median(values) / REPEATS for name, values in seconds.items()}
    rate = product_flop / once[PRODUCT]
    found: dict[str, Any] = {PRODUCT: {"tflop_per_s": rate / 1e12}}
    for name in calls:
        if name == PRODUCT:
            continue
        of = flop(bench, name.removesuffix(", eager"), kind, batch)
        found[name] = {
            "ms": 1000 * once[name],
            "to_unet": ratio(seconds, name, "unet"),
            "share_of_product": of / once[name] / rate,
            "peak_mb": peaks[name],
        }
    return found | missing


def rows() -> list[Row]:
    def row(batch: int, kind: str, compiled: bool) -> Row:
        name = f"B {kind} batch {batch} {'compiled' if compiled else 'eager'}"
        seconds = (200 if kind == "train" else 100) if compiled else 25
        return Row(name, seconds, partial(configuration_b, batch=batch, kind=kind, compiled=compiled))

    kinds = ("train", "forward")
    return [row(b, k, compiled) for compiled in (False, True) for b in BATCHES for k in kinds]
