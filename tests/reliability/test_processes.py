"""Runs of several processes, as torchrun starts them, go on with another number of processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from heterodiff.config.file import dump_config
from tests.training_runs import losses_of, tiny_config

SMALL = {"model__variant": "unet-conv", "model__channel_mult": [1], "model__dropout": 0.0, "training__log_every": 1}


def run(processes: int, config: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "heterodiff.cli", "train", str(config), *arguments, "--quiet"]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(2, 1), (1, 2)], ids=lambda p: f"{p[0]} then {p[1]}")
def test_another_number_of_processes(processes: tuple[int, int], tmp_path: Path) -> None:
    """The same samples in the same order: losses within 1e-5 of those of one process, over the first twenty steps."""
    for name in ("changed", "one"):
        config = tiny_config(tmp_path / name, **SMALL, training__steps=20)
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
    run(processes[0], tmp_path / "changed.yaml", "--stop-after", "10")
    run(processes[1], tmp_path / "changed.yaml")
    run(1, tmp_path / "one.yaml")
    found, expected = losses_of(tmp_path / "changed"), losses_of(tmp_path / "one")
    assert [row[0] for row in found] == [row[0] for row in expected] == list(range(1, 21))
    for row, other in zip(found, expected, strict=True):
        assert row[1] == pytest.approx(other[1], abs=1e-5)
