"""Files of strangers that name, declare or hold what they should not: one error, at once, in little memory."""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from heterodiff.config.file import dump_config
from heterodiff.files import fingerprint
from heterodiff.training.checkpoints.checkpoint import list_checkpoints
from tests.reliability.memory import peak_memory
from tests.test_cli import call
from tests.training_runs import tiny_config


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run as a stranger hands it on, with the one checkpoint it ends with."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    config = tiny_config(folder, training__steps=4, training__warmup_steps=1)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def names(entry: str) -> Callable[[Path], None]:
    """The manifest lists ``entry``, too."""

    def damage(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest[entry] = {"bytes": 0, "xxh3_128": ""}
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


# ---- code in files, rows 13 to 15 ----------------------------------------------------------------------------


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.marker,)


def pickled(folder: Path, marker: Path) -> list[object]:
    with (folder / "w.pkl").open("wb") as file:
        pickle.dump(Marker(marker), file)
    return ["import", folder / "w.pkl", "--out", folder / "out"]


def saved_by_torch(folder: Path, marker: Path) -> list[object]:
    torch.save({"model": Marker(marker)}, folder / "w.pt")
    return ["import", folder / "w.pt", "--out", folder / "out"]


def array_of_objects(folder: Path, marker: Path) -> list[object]:
    np.savez(folder / "data.npz", images=np.array([Marker(marker)] * 4, dtype=object))
    (folder / "config.yaml").write_text(f"data: {{source: images, path: {folder / 'data.npz'}}}\n")
    return ["train", folder / "config.yaml", f"output={folder / 'out'}"]


def yaml_tag(folder: Path, marker: Path) -> list[object]:
    (folder / "config.yaml").write_text(f"output: !!python/object/apply:pathlib.Path.touch ['{marker}']\n")
    return ["train", folder / "config.yaml"]


def pickled_weights_of_a_run(folder: Path, marker: Path) -> list[object]:
    """A pipeline whose weights are a pickle under the name that diffusers would fall back to."""
    run = folder / "run"
    (run / "unet").mkdir(parents=True)
    (run / "model_index.json").write_text(
        '{"_class_name": "HAEPipeline", "unet": ["heterodiff.models.unet", "HAEUNet"]}'
    )
    (run / "unet" / "config.json").write_text('{"_class_name": "HAEUNet"}')
    torch.save({"a": Marker(marker)}, run / "unet" / "diffusion_pytorch_model.bin")
    return ["sample", run]


CODE = [pickled, saved_by_torch, array_of_objects, yaml_tag, pickled_weights_of_a_run]


@pytest.mark.parametrize("make", CODE)
def test_code_is_never_run(
    make: Callable[[Path, Path], list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    assert call(*make(tmp_path, marker)) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def header(declared: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(declared).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, stop: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


SAFETENSORS = {
    "a header of an exabyte": (struct.pack("<Q", 2**60) + b"{}", "truncated, or not safetensors"),
    "a header of 8 megabytes": (struct.pack("<Q", 2**23) + b" " * 2**23, "a header of"),
    "300,000 tensors": (header({f"t{n}": tensor(0, 0, 0) for n in range(300_000)}), "a header of"),
    "overlaps": (header({"a": tensor(0, 8, 2), "b": tensor(4, 12, 2)}, b"\0" * 12), "damaged network"),
    "data that are not there": (header({"a": tensor(0, 4 * 10**9, 10**9)}), "damaged network"),
    "no header": (b"", "truncated, or not safetensors"),
    "text": (b"<html>" * 100, "truncated, or not safetensors"),
}


@pytest.mark.parametrize("what", SAFETENSORS)
def test_weights_of_a_run(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = SAFETENSORS[what]
    (run / "weights.json").unlink()  # a stranger's list would fit the file
    (run / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with peak_memory() as peak:
        assert call("sample", run, "-n", "1") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert peak.megabytes < 100


def test_weights_that_are_not_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "weights.json").unlink()
    file = run / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    assert call("sample", run, "-n", "1") == 1
    assert "NaN or infinite weights" in capsys.readouterr().err


def stored(path: Path, name: str, shape: tuple[int, ...], content: bytes, dtype: str = "|u1") -> None:
    """A compressed npz with one array, whose header and content need not agree."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content)


ARCHIVES = {
    "a name above the folder": ("../../images.npy", (4, 8, 8), (b"\1", 256), "expected one named 'image'"),
    "an absolute name": ("/tmp/images.npy", (4, 8, 8), (b"\1", 256), "expected one named 'image'"),
    "gigabytes that are declared": ("images.npy", (100, 10**4, 10**4), (b"\1", 1000), "needs 10,000,000,000 bytes"),
    "1000 to 1": ("images.npy", (4, 8, 8), (b"\1", 200_000_000), None),
    "fewer than declared": ("images.npy", (400, 8, 8), (b"\1", 1000), "not readable as npz"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, shape, (byte, count), message = ARCHIVES[what]
    (tmp_path / "data").mkdir()
    stored(tmp_path / "data" / "data.npz", name, shape, byte * count)
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{source: images, path: {tmp_path / 'data' / 'data.npz'}, labels: none}}\n")
    with peak_memory() as peak:
        assert call("check", config) == 1
    shown = capsys.readouterr()
    assert (message or "all training images hold the single value") in shown.out + shown.err
    assert peak.megabytes < 100
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.yaml", "data", "data.npz"]
