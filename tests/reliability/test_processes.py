"""Runs of several processes, as torchrun starts them, go on with another number of processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from heterodiff.config.file import dump_config
from heterodiff.models.variants import list_models
from heterodiff.run_folder import CHECKPOINTS
from heterodiff.training.checkpoints.checkpoint import list_checkpoints
from tests.training_runs import assert_same_run, last_checkpoint, losses_of, tiny_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {"model__variant": "unet-conv", "model__channel_mult": [1], "model__dropout": 0.0, "training__log_every": 1}


def launch(processes: int, *command: str) -> str:
    """Run ``python -m ...`` in one or several processes; return what it printed."""
    command = (sys.executable, "-m", *command)
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        launcher = ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}")
        command = (sys.executable, *launcher, *command[1:])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(processes: int, config: Path, *arguments: str) -> None:
    launch(processes, "heterodiff.cli", "train", str(config), *arguments, "--quiet")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [(2, 1), (1, 2), (2, 4)], ids=lambda p: f"{p[0]} then {p[1]}")
def test_another_number_of_processes(processes: tuple[int, int], fsdp: bool, tmp_path: Path) -> None:
    """The same samples in the same order: losses within 1e-5 of those of one process, over the first twenty steps."""
    for name in ("changed", "one"):
        config = tiny_config(tmp_path / name, **SMALL, training__steps=20, training__fsdp=fsdp)
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
    run(processes[0], tmp_path / "changed.yaml", "--stop-after", "10")
    run(processes[1], tmp_path / "changed.yaml")
    run(1, tmp_path / "one.yaml")
    found, expected = losses_of(tmp_path / "changed"), losses_of(tmp_path / "one")
    assert [row[0] for row in found] == [row[0] for row in expected] == list(range(1, 21))
    for row, other in zip(found, expected, strict=True):
        assert row[1] == pytest.approx(other[1], abs=1e-5)
    weights = [load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("changed", "one")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert_close(value, weights[1][key], atol=1e-4, rtol=0)
    own = [len(list((path).glob("model*"))) for path in list_checkpoints(tmp_path / "changed" / CHECKPOINTS)]
    assert own == ([processes[0], processes[1]] if fsdp else [1, 1])


@pytest.mark.slow
def test_split_weights_of_every_variant() -> None:
    """Gradients and an update of two processes, each with parts of the weights and of the batch, as of one."""
    printed = launch(2, "tests.reliability.split_variants")
    assert printed.split() == list_models()


@pytest.mark.slow
def test_a_run_with_split_weights_that_is_stopped_goes_on_exactly(tmp_path: Path) -> None:
    for name in ("stopped", "whole"):
        config = tiny_config(tmp_path / name, **SMALL, training__steps=12, training__fsdp=True)
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
    run(2, tmp_path / "stopped.yaml", "--stop-after", "5")
    run(2, tmp_path / "stopped.yaml")
    run(2, tmp_path / "whole.yaml")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_split_weights_whose_optimizer_is_damaged(tmp_path: Path) -> None:
    """Refused by the name of the file, and one process goes on from the weights of two."""
    config = tiny_config(tmp_path / "run", **SMALL, training__steps=12, training__fsdp=True)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    run(2, tmp_path / "run.yaml", "--stop-after", "5")
    file = next((tmp_path / "run" / CHECKPOINTS).glob("*/optimizer-00002-of-00002.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(AssertionError, match=r"optimizer-00002-of-00002.*damaged"):
        run(1, tmp_path / "run.yaml")
    run(1, tmp_path / "run.yaml", "--resume", "weights-only")
    assert last_checkpoint(tmp_path / "run")[0] == 12
