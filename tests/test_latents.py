"""Stored latents: what is read is what the VAE gave; interruptions lose nothing; nothing damaged is used."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.numpy import load_file, save

from heterodiff.cli import main
from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.config import DataConfig
from heterodiff.data.sources import list_sources, load_data, open_source
from heterodiff.errors import ConfigError, DataError
from heterodiff.latents.encode import encode_data
from heterodiff.latents.plan import plan_of
from heterodiff.latents.reading import load_latents

SIZE = (16, 24)
FLOAT16 = {"rtol": 2**-11, "atol": 2**-25}  # half a unit in the last place


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codec(vae_path) -> KLVAECodec:
    return KLVAECodec(load_vae(vae_path))


def make_images(root: Path, count: int = 6, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    """Noise as PNGs of classes a and b and one without a class."""
    rng = np.random.default_rng(seed)
    for name in [*(f"{label}/{k}.png" for label in "ab" for k in range(count)), "loose.png"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / name)
    return root


def make_npz(path: Path, count: int, size: tuple[int, int] = SIZE) -> Path:
    rng = np.random.default_rng(1)
    np.savez(path, image=rng.integers(0, 60000, (count, *size), dtype=np.uint16), label=np.arange(count) % 3)
    return path


def encode(config: DataConfig, codec: KLVAECodec, vae_path: Path, out: Path, **arguments) -> Path:
    arguments = {"vae_path": vae_path, "shard_size": 4, "batch_size": 3, "quiet": True} | arguments
    return encode_data(load_data(config), config, codec, out, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory, codec, vae_path) -> Path:
    """Latents of 13 images in 4 shards; tests copy the folder."""
    root = tmp_path_factory.mktemp("stored")
    config = DataConfig(path=make_images(root / "images"), val_fraction=0.3)
    return encode(config, codec, vae_path, root / "latents")


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "latents"))


def edit_index(folder: Path, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize("memory_limit_gb", [4.0, 0.0])
@pytest.mark.parametrize("kind", ["png", "npz"])
def test_batches_are_the_posteriors(tmp_path, codec, vae_path, kind, memory_limit_gb):
    path = make_images(tmp_path / "png") if kind == "png" else make_npz(tmp_path / "data.npz", 11)
    config = DataConfig(path=path, val_fraction=0.3)
    images = load_data(config)
    latents = load_latents(encode(config, codec, vae_path, tmp_path / "out"), memory_limit_gb)
    assert latents.spec == images.spec
    assert latents.split_to_dict() == images.split_to_dict()
    for found, expected in ((latents.train, images.train), (latents.val, images.val)):
        assert len(found) == len(expected) > 0
        assert found.labels.dtype == np.int64
        assert np.array_equal(found.labels, expected.labels)
        order = [*range(len(expected))[::-1], 0]
        pictures, labels = expected.batch(order)
        posteriors, found_labels = found.batch(order)
        assert posteriors.dtype == torch.float32
        assert torch.equal(found_labels, labels)
        oracle = torch.cat([codec.posterior(picture[None]) for picture in pictures])
        torch.testing.assert_close(posteriors, oracle, rtol=FLOAT16["rtol"] * 1.01, atol=1e-5)
        item, label = found[len(found) - 1]
        assert torch.equal(item, posteriors[0])
        assert label == int(labels[0])
    mean, std = (
        codec.posterior(images.train.batch(range(len(images.train)))[0])
        .double()
        .numpy()
        .reshape(-1, 2, 4, 24)
        .swapaxes(0, 1)
    )
    np.testing.assert_allclose(latents.latents.mean, mean.mean((0, 2)), rtol=1e-3, atol=1e-4)
    total = np.sqrt(mean.var((0, 2)) + (std**2).mean((0, 2)))
    np.testing.assert_allclose(latents.latents.std, total, rtol=1e-3)
    assert latents.latents.shape == codec.latent_shape(1, *SIZE)
    assert latents.latents.vae_fingerprint == codec.fingerprint()
    assert DataConfig(**latents.latents.data_config) == config.model_copy(update={"path": path.absolute()})
    assert bool(latents.warnings) == (memory_limit_gb == 0)


def test_float16_rounding_is_the_only_change(tmp_path, codec, vae_path):
    """Batches of the same images give the same numbers, so here nothing but rounding may differ."""
    config = DataConfig(path=make_images(tmp_path / "images"), val_fraction=0)
    data = load_data(config)
    latents = load_latents(encode(config, codec, vae_path, tmp_path / "out", shard_size=13, batch_size=13))
    oracle = codec.posterior(data.train.batch(range(13))[0])
    torch.testing.assert_close(latents.train.batch(range(13))[0], oracle, **FLOAT16)


def test_the_files_are_as_described(stored):
    index = json.loads((stored / "index.json").read_text())
    plan = json.loads((stored / "plan.json").read_text())
    assert plan.items() <= index.items()
    assert Path(plan["data_config"]["path"]).is_absolute()
    assert [shard["count"] for shard in index["shards"]] == [4, 4, 4, 1]
    labels = []
    for shard in index["shards"]:
        content = (stored / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
        tensors = load_file(stored / shard["file"])
        assert {name: value.dtype.name for name, value in tensors.items()} == {
            "mean": "float16",
            "std": "float16",
            "label": "int64",
        }
        assert tensors["mean"].shape == tensors["std"].shape == (shard["count"], 4, 4, 6)
        labels += tensors["label"].tolist()
    assert labels == [*plan["train"]["labels"], *plan["val"]["labels"]]
    names = Counter(name.partition("/")[0] for name in plan["train"]["names"])
    found = index["counts"]["train"]
    assert (found["a"], found["b"], found.get("unlabelled", 0)) == (names["a"], names["b"], names["loose.png"])


def test_latents_are_a_source(stored):
    assert "latents" in list_sources()
    data = load_data(DataConfig(source="latents", path=stored))
    split, spec = data.split_to_dict(), data.spec
    assert load_data(DataConfig(source="latents", path=stored), split, spec).split_to_dict() == split
    other = {"train": split["train"][1:], "val": [*split["val"], split["train"][0]]}
    with pytest.raises(DataError, match=r"the run's split is not that of these latents.*start a new run"):
        load_data(DataConfig(source="latents", path=stored), other, spec)
    with pytest.raises(DataError, match="the run's specification is not that of these latents"):
        load_data(DataConfig(source="latents", path=stored), split, replace(spec, height=8))
    with pytest.raises(DataError, match=r"data.path: a folder written by `heterodiff encode`"):
        load_data(DataConfig(source="latents"))
    with pytest.raises(DataError, match="stored latents, not images"):
        open_source(DataConfig(source="latents", path=stored))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 32}, r"data.image_size=\[32, 32\]: the latents in .* were encoded with None; leave it out"),
        ({"labels": "none"}, "data.labels=none"),
        ({"val_fraction": 0.5}, "data.val_fraction=0.5: .* encoded with 0.3"),
        ({"horizontal_flip": True}, "data.horizontal_flip does not apply to stored latents"),
        ({"random_crop": 2}, "data.random_crop does not apply"),
        ({"image_size": SIZE, "channels": 1, "val_fraction": 0.3, "value_range": (0, 255)}, None),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(stored, setting, message):
    config = DataConfig(source="latents", path=stored, **setting)
    if message is None:
        assert len(load_data(config).train) + len(load_data(config).val) == 13
        return
    with pytest.raises(DataError, match=message):
        load_data(config)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_processes_writes_the_same_files(tmp_path, codec, vae_path, stored, world_size):
    config = DataConfig(**load_latents(stored).latents.data_config)
    for rank in reversed(range(world_size)):
        encode(config, codec, vae_path, tmp_path / "out", rank=rank, world_size=world_size)
    assert contents(tmp_path / "out") == contents(stored)


def test_missing_shards_of_another_process_are_no_index(tmp_path, codec, vae_path, stored):
    config = DataConfig(**load_latents(stored).latents.data_config)
    with pytest.raises(DataError, match=r"shard_00001.safetensors: missing; run the same"):
        encode(config, codec, vae_path, tmp_path / "out", rank=0, world_size=2)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_complete_folder_is_left_alone(folder, codec, vae_path, capsys):
    config = DataConfig(**load_latents(folder).latents.data_config)
    before = times(folder)
    encode(config, codec, vae_path, folder, quiet=False)
    assert times(folder) == before
    assert "already complete: 13 images" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["bit", "missing", "truncated", "index missing"])
def test_the_same_command_mends_a_folder(folder, stored, codec, vae_path, damage):
    config = DataConfig(**load_latents(stored).latents.data_config)
    shard = folder / "shard_00001.safetensors"
    content = bytearray(shard.read_bytes())
    before = times(folder)
    if damage == "bit":
        content[-3] ^= 1
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[:-100])
        (folder / "index.json").unlink()
    else:
        (folder / "index.json" if damage == "index missing" else shard).unlink()
    for name in ("shard_00001.safetensors.0123abcd.tmp", "plan.json.0123abcd.tmp"):
        (folder / name).write_bytes(b"leftover of a kill")
    encode(config, codec, vae_path, folder)
    assert contents(folder) == contents(stored)
    after = times(folder)
    assert {name for name in before if before[name] == after[name]} >= {"shard_00000.safetensors", "plan.json"}


class Spoilt(KLVAECodec):
    """Gives ``value`` for images of even index in a batch."""

    value = float("nan")

    def posterior(self, images):
        posterior = super().posterior(images)
        posterior[::2, 1, 2, 3] = self.value
        return posterior


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "NaN or infinite latents for {0}, {2}; check these images, or train it again"),
        (float("-inf"), "NaN or infinite latents for {0}, {2};"),
        (-7e4, "latents beyond 65504 .*float16.* for {0}, {2};"),
    ],
)
def test_unusable_latents_are_named_and_not_written(tmp_path, codec, vae_path, value, message):
    spoilt = Spoilt(codec.vae)
    spoilt.value = value
    config = DataConfig(path=make_images(tmp_path / "images"), val_fraction=0)
    names = load_data(config).train.names
    with pytest.raises(DataError, match=message.format(*names)):
        encode(config, spoilt, vae_path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    with pytest.raises(DataError, match=r"index.json is missing: encoding did not finish; run the same"):
        load_latents(tmp_path / "out")


def change_pixels(root: Path) -> None:
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(root / "b" / "3.png")


def rename_image(root: Path) -> None:
    (root / "b" / "3.png").rename(root / "b" / "30.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_range": (0, 200)}, r"\(transform \(.*\): fingerprint \w+, now \w+\)"),
        ({"image_size": 16}, r"\(transform .*\)"),
        ({"split_seed": 5}, r"\(split into training and held-out images \(data.val_fraction, data.split_seed\)\)"),
        ({"labels": "none"}, r"\(source .*\)"),
        ("shards", r"\(shard size 4, now 5\)"),
        ("vae", r"\(VAE: fingerprint \w+, now \w+\)"),
        (change_pixels, r"\(source \(images, names, labels\): fingerprint \w+, now \w+\)"),
        (rename_image, r"\(source .*\)"),
    ],
)
def test_latents_of_something_else_are_refused(tmp_path, vae_path, change, message):
    own = KLVAECodec(load_vae(vae_path))
    config = DataConfig(path=make_images(tmp_path / "images"))
    out = encode(config, own, vae_path, tmp_path / "out")
    before, arguments = contents(out), {}
    if isinstance(change, dict):
        config = config.model_copy(update=DataConfig(**change).model_dump(include=set(change)))
    elif change == "shards":
        arguments = {"shard_size": 5}
    elif change == "vae":
        own.vae.encoder.conv_in.bias.data += 1
    else:
        change(tmp_path / "images")
    with pytest.raises(DataError, match=f"holds other latents {message}; choose another folder, or delete"):
        encode(config, own, vae_path, out, **arguments)
    assert contents(out) == before


def test_fingerprints_do_not_depend_on_the_place(tmp_path, codec, vae_path):
    plans = []
    for name in ("one", "two"):
        config = DataConfig(path=make_images(tmp_path / name))
        plans.append(plan_of(load_data(config), config, codec, vae_path))
    assert plans[0].source_fingerprint == plans[1].source_fingerprint
    assert plans[0].transform_fingerprint == plans[1].transform_fingerprint


def test_foreign_folders_are_refused(tmp_path, codec, vae_path):
    config = DataConfig(path=make_images(tmp_path / "images"))
    with pytest.raises(DataError, match=r"holds 3 other files \(a, b, loose.png\) and no latents; choose another"):
        encode(config, codec, vae_path, tmp_path / "images")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.tmp").touch()
    with pytest.raises(DataError, match=r"holds 1 other files \(mine.tmp\)"):
        encode(config, codec, vae_path, tmp_path / "other")
    with pytest.raises(DataError, match="is not a folder; choose another"):
        encode(config, codec, vae_path, tmp_path / "images" / "loose.png" / "out")
    out = encode(config, codec, vae_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"latents already; set data.source"):
        plan_of(load_latents(out), config, codec, vae_path)
    (out / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan.json: not readable as JSON: .*; delete .* and encode again"):
        encode(config, codec, vae_path, out)


def test_a_full_disk_is_told_before_and_while_writing(tmp_path, codec, vae_path, monkeypatch):
    config = DataConfig(path=make_images(tmp_path / "images"))
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 99, 99))
        with pytest.raises(DataError, match=r"5,096 bytes are needed for the latents, 99 are free; make room"):
            encode(config, codec, vae_path, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "limited"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(DataError, match=r"shard_00000.*written \(File too large\): [\d,]+ bytes needed, .* free"):
            encode(config, codec, vae_path, out, shard_size=13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    encode(config, codec, vae_path, out, shard_size=13)
    assert len(load_latents(out).train) == 11


SHARD = "shard_00001.safetensors"


def header_of(folder: Path, change) -> None:
    """Rewrite the header of a shard, its length kept."""
    path = folder / SHARD
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(content[:8] + text + content[8 + length :])


def write_shard(folder: Path, **changes) -> None:
    """Replace tensors of a shard and make the index agree."""
    content = save({k: v for k, v in (load_file(folder / SHARD) | changes).items() if v is not None})
    (folder / SHARD).write_bytes(content)
    shards = json.loads((folder / "index.json").read_text())["shards"]
    shards[1] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_index(folder, shards=shards)


def edit_shard(folder: Path, **changes) -> None:
    shards = json.loads((folder / "index.json").read_text())["shards"]
    shards[1] |= changes
    edit_index(folder, shards=shards)


def overwrite(folder: Path, at: int, content: bytes) -> None:
    whole = bytearray((folder / SHARD).read_bytes())
    whole[at : at + len(content)] = content
    (folder / SHARD).write_bytes(whole)


def link(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "elsewhere")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere")


def overlap(header) -> None:
    header["std"]["data_offsets"] = header["mean"]["data_offsets"]


def beyond(header) -> None:
    header["std"]["shape"] = [9, 4, 4, 6]


def nan_latents() -> np.ndarray:
    values = np.zeros((4, 4, 4, 6), np.float16)
    values[2, 1, 1, 1] = np.nan
    return values


BAD_FOLDERS = {
    "no index": (lambda f: (f / "index.json").unlink(), "index.json is missing: .*run the same `heterodiff encode`"),
    "nothing": (lambda f: [p.unlink() for p in f.iterdir()], "no latents here .*write them with `heterodiff encode`"),
    "no folder": (shutil.rmtree, "no such folder of latents"),
    "not JSON": (lambda f: (f / "index.json").write_text("{'a'"), "index.json: not readable as JSON: .*encode again"),
    "deep JSON": (lambda f: (f / "index.json").write_text("[" * 10**6), "index.json: not readable as JSON"),
    "not text": (lambda f: (f / "index.json").write_bytes(b"\xff\xfe\x00"), "index.json: not readable as JSON"),
    "a list": (lambda f: (f / "index.json").write_text("[1]"), "expected a JSON object, found list"),
    "format": (lambda f: edit_index(f, format=2), "latents of format 2, expected 1; encode the images again"),
    "unknown key": (lambda f: edit_index(f, extra=1), "damaged: extra: "),
    "shape": (lambda f: edit_index(f, shape=[4, 4]), "damaged: shape"),
    "huge shape": (lambda f: edit_index(f, shape=[4, 2**40, 2**40]), r"expected tensors .*1099511627776.*found"),
    "huge label": (lambda f: edit_index(f, train={"names": ["a"], "labels": [2**70]}), "damaged: train.labels.0: "),
    "NaN mean": (lambda f: edit_index(f, mean=[float("nan")] * 4), "damaged: mean.0: "),
    "few means": (lambda f: edit_index(f, mean=[0.0]), "expected mean and std of 4 channels, found 1 and 4"),
    "few labels": (lambda f: edit_index(f, val={"names": ["a"], "labels": []}), "a label for each of 1 names, found 0"),
    "no training": (lambda f: edit_index(f, train={"names": [], "labels": []}), "expected training images, found none"),
    "label": (lambda f: edit_index(f, val={"names": ["a"], "labels": [2]}), "below the number of classes, 2, found 2"),
    "specification": (lambda f: edit_index(f, spec={"height": 1}), "damaged: saved image specification: expected"),
    "few shards": (lambda f: edit_index(f, shards=[]), "expected 4 shards, found 0"),
    "shard above": (lambda f: edit_shard(f, file=f"../{SHARD}"), r"expected shard shard_00001.* found \.\./shard"),
    "shard absolute": (lambda f: edit_shard(f, file=f"/etc/{SHARD}"), "expected shard shard_00001.* found /etc"),
    "shard count": (lambda f: edit_shard(f, count=5), "shard_00001.* of 4 images, found shard_00001.* of 5"),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD}: missing; run the same `heterodiff encode` again"),
    "link": (link, f"{SHARD}: expected a file, found a link"),
    "truncated": (lambda f: os.truncate(f / SHARD, 700), r"expected 1,7\d\d bytes, found 700; run the same"),
    "huge header": (lambda f: overwrite(f, 0, struct.pack("<Q", 2**62)), f"{SHARD}: truncated or damaged: .*header"),
    "not JSON header": (lambda f: overwrite(f, 8, b"[[[[[["), f"{SHARD}: truncated or damaged: .*header"),
    "overlapping": (lambda f: header_of(f, overlap), f"{SHARD}: truncated or damaged: .*offset"),
    "beyond its end": (lambda f: header_of(f, beyond), f"{SHARD}: truncated or damaged: "),
    "wrong shape": (
        lambda f: write_shard(f, mean=np.zeros((4, 4, 6, 4), np.float16)),
        r"expected tensors .*mean F16 \[4, 4, 4, 6\].* found .*mean F16 \[4, 4, 6, 4\]",
    ),
    "wrong type": (lambda f: write_shard(f, mean=np.zeros((4, 4, 4, 6), np.float32)), "found .*mean F32"),
    "no std": (lambda f: write_shard(f, std=None), r"expected tensors .*std.* found label .*mean"),
    "other labels": (lambda f: write_shard(f, label=np.full(4, -1)), "its labels are not those of the index"),
}  # fmt: skip
ONLY_IN_MEMORY = {
    "one bit": (lambda f: overwrite(f, 900, b"\x01\x02\x03"), f"{SHARD}: damaged: expected SHA-256 .*, found .*; run"),
    "NaN": (lambda f: write_shard(f, mean=nan_latents()), f"{SHARD}: NaN or infinite latents"),
}


@pytest.mark.parametrize("memory_limit_gb", [4.0, 0.0])
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused(folder, case, memory_limit_gb):
    damage, message = BAD_FOLDERS[case]
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_latents(folder, memory_limit_gb)


@pytest.mark.parametrize("case", ONLY_IN_MEMORY)
def test_bad_values_are_refused(folder, case):
    damage, message = ONLY_IN_MEMORY[case]
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_latents(folder)


def test_memory_mapped_latents_are_checked_when_read(folder):
    data = load_latents(folder, 0)
    write_shard(folder, mean=nan_latents())
    with pytest.raises(DataError, match=rf"latents of {data.train.names[6]}: NaN or infinite"):
        data.train.batch(range(8))
    os.truncate(folder / SHARD, 900)
    with pytest.raises(DataError, match=rf"{SHARD}: can no longer be read"):
        data.train.batch([5])
    assert len(data.train.batch([0, 1])[1]) == 2
    with pytest.raises(IndexError):
        data.train.batch([100])


def test_a_large_folder_is_not_read_into_memory(folder):
    """64 MB of latents: opened and used without them; loader workers get no copy either."""
    count, shape = 8 * 64, (4, 64, 64)
    tensors = {k: np.ones((64, *shape), np.float16) for k in ("mean", "std")} | {"label": np.zeros(64, np.int64)}
    content = save(tensors)
    shard = {"count": 64, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    shards = [{"file": f"shard_{k:05d}.safetensors", **shard} for k in range(8)]
    for entry in shards:
        (folder / entry["file"]).write_bytes(content)
    del tensors, content
    train = {"names": [str(k) for k in range(count)], "labels": [0] * count}
    edit_index(folder, shape=shape, shard_size=64, shards=shards, train=train, val={"names": [], "labels": []})
    size = 2 * 2 * count * 4 * 64 * 64
    packed = pickle.dumps(load_latents(folder, 0.0).train)
    assert len(packed) < 50_000
    assert torch.equal(pickle.loads(packed).batch([99])[0], load_latents(folder, 4.0).train.batch([99])[0])
    grown = {limit: int(subprocess.check_output([sys.executable, "-c", MEMORY, folder, limit])) for limit in ("0", "4")}
    assert grown["0"] < size / 4 < size * 0.9 < grown["4"]


MEMORY = """
import sys
from pathlib import Path
import psutil
from heterodiff.latents.reading import load_latents
load_latents(Path(sys.argv[1]), 0.0).train.batch([0])  # what only the first use takes
before = psutil.Process().memory_info().rss
data = load_latents(Path(sys.argv[1]), float(sys.argv[2]))
for start in range(0, len(data.train), 8):
    assert float(data.train.batch(range(start, start + 8))[0].min()) == 1
print(psutil.Process().memory_info().rss - before)
"""
"""Bytes by which a fresh process grows; in an old one, what was freed before would take the place of what is read."""


def command(config: Path, vae_path: Path, out: Path, *options: str) -> list[str]:
    return ["encode", str(config), "--vae", str(vae_path), "--out", str(out), *options]


def write_config(file: Path, **data) -> Path:
    file.write_text(json.dumps({"data": data}))
    return file


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_command_goes_on(tmp_path, codec, vae_path):
    """Finished shards are not written again, and the end is that of a command that was not killed."""
    config = write_config(tmp_path / "data.yaml", path=str(make_npz(tmp_path / "data.npz", 390, (32, 32))))
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "heterodiff.cli"]
    arguments += command(config, vae_path, out, "--batch-size", "1", "--shard-size", "8")
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while len(list(out.glob("*.safetensors"))) < 10:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -9
    assert not (out / "index.json").exists()
    finished = {name: at for name, at in times(out).items() if name.endswith((".safetensors", "plan.json"))}
    assert 10 < len(finished) < 49
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"; {len(finished) - 1} finished shards were there already" in done.stdout
    wanted = ("351 training and 39 held-out", f"4x8x8, in {out}", "images/s", "expected 1", "data.source=latents")
    for words in wanted:
        assert words in done.stdout
    assert finished.items() <= times(out).items()
    data_config = DataConfig(path=tmp_path / "data.npz")
    encode(data_config, codec, vae_path, tmp_path / "straight", shard_size=8, batch_size=1)
    assert contents(out) == contents(tmp_path / "straight")


def test_torchrun_shares_the_work(tmp_path, codec, vae_path):
    config = write_config(tmp_path / "data.yaml", path=str(make_images(tmp_path / "images")), horizontal_flip=True)
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "heterodiff.cli"]
    options = ("--batch-size", "3", "--shard-size", "4")
    done = subprocess.run(
        [sys.executable, *arguments, *command(config, vae_path, tmp_path / "out", *options)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next     heterodiff train") == 1
    assert "stored latents are not augmented: leave out data.horizontal_flip" in done.stdout
    data_config = DataConfig(path=tmp_path / "images", horizontal_flip=True)
    assert contents(tmp_path / "out") == contents(encode(data_config, codec, vae_path, tmp_path / "straight"))


@pytest.mark.parametrize(
    ("data", "vae", "out", "message"),
    [
        ({}, "images", "out", "holds no VAE"),
        ({}, "nowhere", "out", "no such folder; train one with recipe `vae`"),
        ({}, None, "images", "holds 3 other files"),
        ({}, None, "data.yaml/out", "data.yaml is not a folder"),
        ({"channels": 3}, None, "out", "set data.channels=1"),
        ({"channels": 3, "image_size": 16}, None, "out", "set data.channels=1"),
        ({"image_size": [18, 16]}, None, "out", "18x16: the VAE needs sides divisible by 4; set data.image_size="),
        ({"source": "latents"}, None, "out", "data.source=latents: encoded already"),
    ],
)
def test_the_command_refuses_before_it_writes(tmp_path, vae_path, capsys, data, vae, out, message):
    config = write_config(tmp_path / "data.yaml", path=str(make_images(tmp_path / "images")), **data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(command(config, tmp_path / vae if vae else vae_path, tmp_path / out))
    assert stop.value.code == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_codec_of_other_images_is_refused(tmp_path, codec, vae_path):
    config = DataConfig(path=make_images(tmp_path / "images", size=(18, 16)))
    with pytest.raises(ConfigError, match="sides divisible by 4"):
        encode(config, codec, vae_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
