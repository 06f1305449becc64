"""Files of strangers that name, declare or hold what they should not: one error, at once, in little memory."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from heterodiff.config.file import dump_config
from heterodiff.files import fingerprint
from heterodiff.training.checkpoints.checkpoint import list_checkpoints
from heterodiff.training.start import train
from tests.test_cli import call
from tests.training_runs import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_config(folder, training__steps=2, training__warmup_steps=1), quiet=True)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run as a stranger hands it on, with the one checkpoint it ends with."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    config = tiny_config(folder, training__steps=4, training__warmup_steps=1)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def names(entry: str) -> Callable[[Path], None]:
    """The manifest lists ``entry``, too."""

    def damage(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest[entry] = {"bytes": 0, "sha256": ""}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return damage


def pipe(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "pipe")
    names("pipe")(checkpoint)


def link(checkpoint: Path) -> None:
    (checkpoint / "link").symlink_to("/dev/zero")
    names("link")(checkpoint)


def many_tensors(checkpoint: Path) -> None:
    declared = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(300_000)}
    header = json.dumps(declared).encode()
    (checkpoint / "more.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["more.safetensors"] = fingerprint(checkpoint / "more.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def brackets(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[" * 200_000)


CHECKPOINTS = {
    "a device": (names("/dev/zero"), "expected a file of the checkpoint itself"),
    "a file elsewhere": (names("../../config.yaml"), "expected a file of the checkpoint itself"),
    "a pipe": (pipe, "expected a file of the checkpoint itself"),
    "a link": (link, "expected a file of the checkpoint itself"),
    "300,000 tensors": (many_tensors, "a header of"),
    "200,000 brackets": (brackets, "not readable as JSON"),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_checkpoints(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = CHECKPOINTS[what]
    for checkpoint in list_checkpoints(run / "checkpoints"):
        damage(checkpoint)
    assert call("train", run / "config.yaml") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no usable checkpoint: ")
    assert message in error
    assert len(error) < 2000


LOAD = """
import resource, sys
from pathlib import Path
from heterodiff.models.loading import load_network
from heterodiff.models.unet import HAEUNet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_network(HAEUNet, Path(sys.argv[1]))
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured in kilobytes on Linux")
@pytest.mark.parametrize("changes", [{"model_channels": 2048}, {"layers_per_block": 10**6}])
def test_a_network_larger_than_its_weights(changes: dict[str, int], run: Path) -> None:
    """A configuration of gigabytes, or of a million layers, beside weights of megabytes."""
    (run / "weights.json").unlink()
    config = json.loads((run / "unet" / "config.json").read_text())
    (run / "unet" / "config.json").write_text(json.dumps(config | changes))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30, 6 * 2**30))

    command = [sys.executable, "-c", LOAD, str(run / "unet")]
    shown = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, timeout=120, check=True).stdout
    message, megabytes = shown.strip().splitlines()
    assert "describes a larger network than the weights beside it" in message
    assert int(megabytes) < 100


def test_latents_given_as_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(4):
            latent = np.random.default_rng(number).standard_normal((4, 8, 8)).astype(np.float32)
            np.save(tmp_path / "data" / label / f"{number}.npy", latent)
    (tmp_path / "config.yaml").write_text(f"data: {{source: images, path: {tmp_path / 'data'}}}\n")
    for command in ("check", "train"):
        assert call(command, tmp_path / "config.yaml", f"output={tmp_path / 'run'}") == 1
        shown = capsys.readouterr()
        assert "look like latents of a VAE" in shown.out + shown.err
    assert not (tmp_path / "run").exists()
    assert call("check", tmp_path / "config.yaml", "data.value_range=[-5, 5]") == 0
