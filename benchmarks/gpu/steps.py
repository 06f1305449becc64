"""Rows about whole runs: launches and waits a step, images a second, time to the first step."""

import itertools
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.recipes import SELDOM, SHIPPED, config_of
from benchmarks.gpu.session import ROOT, Bench, Row, Unavailable, Unexpected, error_of, own_environment

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
FIRST_STEP = "first step of train digits"
COMPILING = "training of digits, eager and compiled"
PAYS = "compiling_pays_after_steps"
LAUNCHES = ("LaunchKernel", "GraphLaunch")


def totals(calls: Mapping[str, int]) -> Counter[str]:
    """Launches, copies and waits among events of CUDA by name, as torch.profiler gives them."""
    found: Counter[str] = Counter()
    for name, count in calls.items():
        if any(part in name for part in LAUNCHES):
            found["launches"] += count
        elif name.startswith("Memcpy HtoD"):
            found["copies_to_device"] += count
        elif name.startswith("Memcpy DtoH"):
            found["copies_from_device"] += count
        elif name in WAITS:
            found["waits"] += count
    return found


def counted(bench: Bench, call: Callable[[], object]) -> Counter[str]:
    """What ``call`` asks of the device.

    Raises:
        Unavailable: not CUDA.
        Unexpected: the profiler saw nothing.
    """
    if bench.device.type != "cuda":
        raise Unavailable("only CUDA's calls are counted")
    from torch.profiler import ProfilerActivity, profile

    bench.wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        bench.wait()
    found = totals({event.key: event.count for event in profiler.key_averages()})
    if not found["launches"]:
        raise Unexpected("the profiler saw no kernel launches")
    return found


def a_step(few: Counter[str], many: Counter[str], steps: int) -> dict[str, float]:
    """Counts of one step, given those of two runs of which one has ``steps`` more."""
    return {name: (many[name] - few[name]) / steps for name in sorted(few | many)}


def counts_of_training(bench: Bench, name: str) -> dict[str, Any]:
    """Launches, copies and waits of a training step between two lines of the log, of each stage of a configuration.

    Counted is the difference between runs of 10 and of 20 steps, so that neither start nor end counts.
    """
    from heterodiff.training.codec_stage import codec_run
    from heterodiff.training.start import train

    if bench.device.type != "cuda":
        raise Unavailable("only CUDA's calls are counted")
    folder, found = bench.folder / f"counts {name}", {}
    first = codec_run(config_of(bench, name, folder / "none", 2, folder / "none codec"))
    if first is not None:
        stages = [
            codec_run(config_of(bench, name, folder / f"{n}", n, folder / f"{n} codec", log_every=SELDOM))
            for n in (10, 20)
        ]
        few, many = (counted(bench, partial(train, stage, quiet=True)) for stage in stages)
        found[first.recipe] = a_step(few, many, 10)
    codec = folder / "codec"
    train(config_of(bench, name, folder / "first", 2, codec), quiet=True)  # trains the codec, and warms up
    runs = [config_of(bench, name, folder / f"{n}", n, codec, log_every=SELDOM) for n in (10, 20)]
    few, many = (counted(bench, partial(train, run, quiet=True)) for run in runs)
    return found | {runs[0].recipe: a_step(few, many, 10)}


def counts_of_sampling(bench: Bench) -> dict[str, Any]:
    """Launches, copies and waits of a denoising step of ``digits``."""
    pipeline = _digits(bench)
    draw = partial(pipeline, [0] * 8, batch_size=8)
    draw(num_inference_steps=2)
    few, many = (counted(bench, partial(draw, num_inference_steps=n)) for n in (5, 15))
    return a_step(few, many, 10)


def _digits(bench: Bench) -> Any:
    """The pipeline of a few steps of ``digits``."""
    from heterodiff.pipelines.load import load_generation
    from heterodiff.training.start import train

    folder = bench.folder / "digits to sample"
    train(config_of(bench, "digits", folder, 2), quiet=True)  # nothing is done where it is there
    return load_generation(folder)


def training_rate(bench: Bench, precision: str) -> dict[str, Any]:
    """Images a second of training ``digits``, between lines of the log; the first ones, which warm up, left out."""
    from heterodiff.training.start import train

    every = bench.size(50, 1)
    folder = bench.folder / f"rate {precision}"
    config = config_of(bench, "digits", folder, 6 * every, log_every=every, precision=precision)
    peak = bench.peak_mb(lambda: train(config, quiet=True))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row][2:]
    batch = config.training.batch_size
    return {"images_per_second": median(rates), "least": min(rates), "batch": batch, "peak_mb": peak}


def compiling(bench: Bench) -> dict[str, Any]:
    """Seconds of the first step and of a later one of ``digits``, eager and compiled, and when compiling pays.

    The number of steps from which on it pays goes into ``src/heterodiff/measured.json``; None if it never does.
    """
    from heterodiff.training.start import train

    seconds: dict[str, float] = {}
    for name, compiled in (("eager", False), ("compiled", not bench.tiny)):
        torch.compiler.reset()
        taken: list[float] = [time.perf_counter()]
        steps = bench.size(100, 3)
        folder = bench.folder / f"compiling {name}"
        config = config_of(bench, "digits", folder, steps, compile=compiled)
        train(config, quiet=True, on_step=lambda step, loss, taken=taken: taken.append(time.perf_counter()))
        each = [after - before for before, after in itertools.pairwise(taken)]
        seconds |= {f"{name}, start and first step": each[0], f"{name}, a step": median(each[2:])}
    costs = seconds["compiled, start and first step"] - seconds["eager, start and first step"]
    saves = seconds["eager, a step"] - seconds["compiled, a step"]
    return seconds | {PAYS: math.ceil(max(0.0, costs) / saves) if saves > 0 else None}


def sampling_rate(bench: Bench, graphs: bool) -> dict[str, Any]:
    """Images a second of sampling ``digits``, 20 steps with guidance.

    Args:
        graphs: the network as CUDA graphs, by torch.compile.

    Raises:
        Unavailable: graphs without CUDA.
    """
    from heterodiff.compiling import compile_for_drawing

    if graphs and bench.device.type != "cuda":
        raise Unavailable("CUDA graphs need CUDA")
    pipeline, found = _digits(bench), {}
    steps = bench.size(20, 2)
    if graphs:
        compile_for_drawing(pipeline.unet, "graphs", bench.device)
    for count in bench.size((16, 256), (2,)):
        draw = partial(pipeline, [0] * count, batch_size=count, num_inference_steps=steps, guidance_scale=1.5)
        draw()
        bench.wait()
        start = time.perf_counter()
        draw()  # brings the images to the CPU, and so waits
        found[f"batch {count}"] = count / (time.perf_counter() - start)
    return found


def first_step(bench: Bench) -> dict[str, Any]:
    """Seconds from the command ``heterodiff train digits`` to its first step, in a new process."""
    folder = bench.folder / "first step"
    overrides = ["training.steps=1", "training.log_every=1", "sampling.num_inference_steps=2", f"output={folder}"]
    command = [sys.executable, "-c", "from heterodiff.cli import main; main()"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "train", str(ROOT / "configs" / "digits.yaml"), *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=own_environment(),
    )
    try:
        log, seconds = folder / "metrics.jsonl", None
        while seconds is None and process.poll() is None:
            time.sleep(0.02)
            if log.is_file() and log.stat().st_size:
                seconds = time.perf_counter() - start
        errors = process.communicate()[1]
    finally:
        process.kill()
    if process.returncode or seconds is None:
        raise error_of(errors)
    return {"seconds": seconds}


def measured_file(device: str, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Content of ``src/heterodiff/measured.json`` with what ``rows`` found on ``device``; None if nothing."""
    from heterodiff.compiling import measured

    row = rows.get(COMPILING)
    if row is None or row["state"] != "done":
        return None
    return json.dumps(measured() | {device: {PAYS: row["found"][PAYS]}}, indent=1)


def rows() -> list[Row]:
    return [
        Row(FIRST_STEP, 30, first_step),
        *(Row(f"counts of training {name}", 40, partial(counts_of_training, name=name)) for name in SHIPPED),
        Row("counts of sampling", 15, counts_of_sampling),
        *(Row(f"images/s of training, {p}", 20, partial(training_rate, precision=p)) for p in ("bfloat16", "float32")),
        Row(COMPILING, 120, compiling),
        Row("images/s of sampling", 15, partial(sampling_rate, graphs=False)),
        Row("images/s of sampling, CUDA graphs", 60, partial(sampling_rate, graphs=True)),
    ]
