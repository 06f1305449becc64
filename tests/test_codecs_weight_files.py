"""Files of weights that are damaged, hostile, or of another kind."""

import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from heterodiff.codecs.weight_files import read_weights, tidy_tensors
from heterodiff.errors import CheckpointError


class Malicious:
    """Creates a marker file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def write_safetensors(path: Path, header: dict, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("how", ["pickle", "zip", "legacy", "nested"])
def test_malicious_pickle_is_refused(suffix, how, tmp_path):
    path, marker = tmp_path / f"model{suffix}", tmp_path / "marker"
    content = {"a": torch.zeros(2), "b": Malicious(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content["b"]))
    elif how == "nested":
        torch.save({"state_dict": content}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match="refused") as caught:
        read_weights(path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert how == "pickle" or "pathlib.Path.touch" in str(caught.value) or "getattr" in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "ema"])
def test_flat_and_nested_dicts(legacy, wrapper, tmp_path):
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    content = weights if wrapper is None else {wrapper: weights, "step": 3}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    file = read_weights(tmp_path / "m.pt")
    assert set(file.tensors) == {"a", "b"}
    assert torch.equal(file.tensors["a"], weights["a"])
    assert bool(file.notes) == (wrapper is not None)


def test_ema_goes_first(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}, tmp_path / "m.pt")
    file = read_weights(tmp_path / "m.pt")
    assert file.tensors["a"] == 1
    assert "model" in file.notes[0]


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1)],
        torch.zeros(1),
        {"a": torch.zeros(1), "step": 3},
        {1: torch.zeros(1)},
        {"state_dict": {"deep": {"a": torch.zeros(1)}}},
        {},
    ],
)
def test_other_contents_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        read_weights(tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 8, 100, -20])
def test_truncated_files(name, keep, tmp_path):
    path = tmp_path / name
    weights = {"a": torch.arange(100.0)}
    torch.save(weights, path) if name == "m.pt" else save_file(weights, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=name):
        read_weights(path)


def test_missing_file_folder_and_other_suffix(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"x")
    for path, message in [("no.pt", "no such file"), ("", "no such file"), ("m.onnx", "found '.onnx'")]:
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / path)


def test_hostile_safetensors(tmp_path, monkeypatch):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    overlap = write_safetensors(tmp_path / "overlap.safetensors", {"a": entry, "b": entry}, bytes(8))
    beyond = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    outside = write_safetensors(tmp_path / "outside.safetensors", {"a": beyond}, bytes(8))
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    long = tmp_path / "long.safetensors"
    with long.open("wb") as file:  # sparse: a header of 90 MB that is really there
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_008)
    parsed = []

    def recorded(path, **options):
        parsed.append(Path(path))
        return safe_open(path, **options)

    monkeypatch.setattr("heterodiff.codecs.weight_files.safe_open", recorded)
    for path in (overlap, outside, huge, long):
        with pytest.raises(CheckpointError, match=path.name):
            read_weights(path)
    assert parsed == [overlap, outside]  # a header out of all proportion is not even read


def test_bad_tensors(tmp_path):
    path = tmp_path / "m.pt"
    for tensor, message in [
        (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
        (torch.tensor([1.0, float("inf")]), "NaN or infinite"),
        (torch.tensor([1, 2]), "expected dense floats"),
        (torch.eye(2).to_sparse(), "expected dense floats"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            tidy_tensors(path, {"a": torch.zeros(1), "b": tensor})


def test_tensors_that_claim_more_than_the_file_has(tmp_path):
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="claim"):
        read_weights(tmp_path / "m.pt")


def test_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as plain,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(CheckpointError, match="compressed"):
        read_weights(tmp_path / "z.pt")


def test_tidy_tensors_are_float32_and_own_their_memory(tmp_path):
    base = torch.arange(8.0)
    tidy, notes = tidy_tensors(tmp_path, {"a": base[:4], "b": base, "c": base, "d": base.half()})
    assert len({tensor.untyped_storage().data_ptr() for tensor in tidy.values()}) == 4
    assert all(tensor.dtype == torch.float32 for tensor in tidy.values())
    assert "float16" in notes[0]
