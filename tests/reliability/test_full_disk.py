"""Disks that are full or read-only, for real: one clear error, nothing that was there is lost, and a way on."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterodiff.config.file import dump_config
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from tests.test_cli import call
from tests.training_runs import last_checkpoint, tiny_config

KILOBYTES = 64_000


class Disk:
    """A file system in memory whose size can change."""

    def __init__(self, folder: Path):
        self.folder = folder

    def remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.folder)], check=True)

    def leave(self, kilobytes: int) -> None:
        """Leave this much room."""
        used = subprocess.run(["du", "-sk", str(self.folder)], capture_output=True, text=True, check=True).stdout
        self.remount(f"size={int(used.split()[0]) + kilobytes}k")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={KILOBYTES}k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by the administrator of a Linux machine alone")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def configured(disk: Disk, folder: Path, **overrides: object) -> Path:
    small = {"model__variant": "unet-conv", "model__channel_mult": [1], "training__log_every": 1}
    every = {"training__steps": 4, "training__checkpoint_every": 2, "training__preview_every": 2}
    config = tiny_config(disk.folder / "run", **small | every | {"training__tensorboard": True} | overrides)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "config.yaml"


ROOM = [4, 16, 24, 32, 100, 3300, 3700, 4100, 7300, 7380]
"""Kilobytes at which a whole run, of 7,440, fails in its facts, a checkpoint, a pipeline, a preview or a row."""


@pytest.mark.parametrize("kilobytes", ROOM)
def test_training_until_the_disk_is_full(
    kilobytes: int, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = configured(disk, tmp_path), disk.folder / "run"
    disk.remount(f"size={kilobytes}k")
    assert call("train", config) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {run}")
    assert "No space left" in error or "bytes needed" in error
    checkpoints = [read_checkpoint(path).step for path in list_checkpoints(run / "checkpoints")]  # all are sound
    disk.remount(f"size={KILOBYTES}k")
    steps = 0 if not checkpoints else max(checkpoints)
    capsys.readouterr()
    assert call("train", config) == 0
    assert last_checkpoint(run)[0] == 4
    assert (f"going on from step {steps}" in capsys.readouterr().out) == (steps > 0)
    assert call("sample", run, "-n", "1") == 0


def test_an_earlier_pipeline_stays_while_the_next_finds_no_room(disk: Disk, tmp_path: Path) -> None:
    config, run = configured(disk, tmp_path), disk.folder / "run"
    assert call("train", config, "--stop-after", "2") == 0
    disk.leave(3300)  # a checkpoint, but no pipeline
    assert call("train", config) == 1
    assert last_checkpoint(run)[0] == 4
    disk.remount(f"size={KILOBYTES}k")
    assert call("sample", run, "-n", "1", "--out", tmp_path / "out") == 0


COMMANDS = {
    "sample": ("sample", "{run}", "-n", "4"),
    "evaluate": ("evaluate", "{run}", "-n", "20"),
    "train": ("train", "{config}", "training.steps=5"),
}


@pytest.mark.parametrize("state", ["full", "read-only"])
@pytest.mark.parametrize("name", ["sample", pytest.param("evaluate", marks=pytest.mark.slow), "train"])
def test_commands_on_a_disk_that_takes_nothing(
    name: str, state: str, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = configured(disk, tmp_path), disk.folder / "run"
    assert call("train", config) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    disk.leave(0) if state == "full" else disk.remount("ro")
    command = [part.format(run=run, config=config) for part in COMMANDS[name]]
    assert call(*command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {run}")
    assert "cannot be written" in error
    if state == "read-only" and name == "train":
        assert not any((run / "samples").glob("step_000005*"))
    disk.remount("rw" if state == "read-only" else f"size={KILOBYTES}k")
    changed = {path for path, content in before.items() if path.read_bytes() != content}
    assert {path.name for path in changed} <= {"metrics.jsonl", "report.html"}
    assert call(*command) == 0
    grids = list(run.glob("generated/*/grid.png"))
    assert all(np.asarray(Image.open(grid)).size for grid in grids)
