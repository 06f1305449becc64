"""The estimate of `heterodiff check --gpus` beside two processes that exchange gradients through gloo.

    python -m benchmarks.scaling [--rounds 3] [--channels 128]

Each process has one thread. The rate of the link is measured first; then the estimate, and the steps of one and of two
processes, take turns.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import RESULTS, write_results
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.training.build import load_run_data
from heterodiff.training.preflight.findings import Rows
from heterodiff.training.preflight.scaling import scaled
from heterodiff.training.preflight.trial import try_run

PROCESSES = 2
OVERRIDES = ("training.batch_size=64", "training.steps=40", "training.log_every=10", "training.preview_every=1000000")
LINK = """
import os, time, torch
import torch.distributed as dist
dist.init_process_group("gloo")
values = torch.ones(2**24)
for _ in range(3):
    dist.all_reduce(values)
start = time.perf_counter()
for _ in range(10):
    dist.all_reduce(values)
if dist.get_rank() == 0:
    print(10 * values.nbytes / (time.perf_counter() - start) / 1e9)
dist.destroy_process_group()
"""


def launched(*command: str, processes: int) -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run([*start, *command], check=True, capture_output=True, text=True, env=environment).stdout


def step_seconds(processes: int, folder: Path, overrides: tuple[str, ...]) -> float:
    """Median over log rows of the seconds of a step, without the first row."""
    config = str(shipped_configs() / "digits.yaml")
    launched("-m", "heterodiff.cli", "train", config, *overrides, f"output={folder}", "--quiet", processes=processes)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(64 / row["images_per_second"] for row in rows[1:] if "images_per_second" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", type=int, default=128, help="width of the network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    overrides = (*OVERRIDES, f"model.model_channels={options.channels}")
    config = load_config(shipped_configs() / "digits.yaml", overrides)
    data = load_run_data(config)
    estimates, found = [], []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "link.py"
        script.write_text(LINK)
        link = float(launched(str(script), processes=PROCESSES).split()[-1])
        for number in range(options.rounds):
            (part,) = try_run(config, data, Rows())
            estimate = scaled(config, data, part.parameters, PROCESSES, link)
            estimates.append([part.step_seconds, *estimate.step_seconds])
            found.append([step_seconds(n, Path(folder) / f"{n} {number}", overrides) for n in (1, PROCESSES)])
    one, least, most = (statistics.median(values) for values in zip(*estimates, strict=True))
    alone, together = (statistics.median(values) for values in zip(*found, strict=True))
    print(f"link {link:.2f} GB/s, {part.parameters / 1e6:.2f} M parameters")
    print(f"one process   estimated {1000 * one:.1f} ms, found {1000 * alone:.1f} ms a step")
    print(f"two processes estimated {1000 * least:.1f} to {1000 * most:.1f} ms, found {1000 * together:.1f} ms a step")
    print(f"times as fast: estimated {one / most:.2f} to {one / least:.2f}, found {alone / together:.2f}")
    known = json.loads((RESULTS / "scaling.json").read_text()) if (RESULTS / "scaling.json").is_file() else {}
    write_results(
        "scaling",
        {
            **known,
            f"{options.channels} channels": {
                "parameters": part.parameters,
                "link_gb_per_second": link,
                "estimated_seconds": {"one": one, "two": [least, most]},
                "found_seconds": {"one": alone, "two": together},
            },
        },
    )


if __name__ == "__main__":
    main()
