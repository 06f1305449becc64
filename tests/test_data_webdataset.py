"""Shards give the images, classes and captions that a folder of the same files gives, and refuse what is damaged."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterodiff.config import DataConfig
from heterodiff.data.decoding import decode_file
from heterodiff.data.sources import load_data
from heterodiff.data.sources.shards import find_shards
from heterodiff.errors import DataError
from heterodiff.training.start import train
from tests.training_runs import losses_of, tiny_config

SHARDS, SAMPLES = 3, 8


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, *kinds: str, shards: int = SHARDS, samples: int = SAMPLES) -> Path:
    """Samples of three classes, with members of these ``kinds`` beside their images."""
    for shard in range(shards):
        members = {}
        for number in range(shard * samples, (shard + 1) * samples):
            label, text = "abc"[number % 3], f"a {number % 3}"
            content = {"cls": label.encode(), "txt": text.encode()}
            content["json"] = json.dumps({"label": label, "caption": [text, "a thing"]}).encode()
            members[f"{number:04d}.png"] = png(number)
            members |= {f"{number:04d}.{kind}": content[kind] for kind in kinds}
        write_shard(folder / f"part-{shard:03d}.tar", members)
    return folder


def config(path: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"source": "webdataset", "path": path, "val_fraction": 0.25, **settings})


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("memory_limit_gb", [4.0, 1e-9])
def test_images_and_classes(kind: str, memory_limit_gb: float, tmp_path: Path) -> None:
    data = load_data(config(write_shards(tmp_path, kind), memory_limit_gb=memory_limit_gb))
    assert data.spec.class_names == ("a", "b", "c")
    assert len(data.train) + len(data.val) == SHARDS * SAMPLES
    (tmp_path / "one.png").write_bytes(b"")
    for part in (data.train, data.val):
        images, labels = part.batch(range(len(part)))
        for name, image, label in zip(part.names, images, labels.tolist(), strict=True):
            shard, _, file = name.partition("/")
            number = int(file.removesuffix(".png"))
            assert shard == f"part-{number // SAMPLES:03d}.tar"
            (tmp_path / "one.png").write_bytes(png(number))
            np.testing.assert_allclose(image.numpy() * 255, decode_file(tmp_path / "one.png"), atol=1e-4)
            assert label == number % 3


@pytest.mark.parametrize(("kind", "texts"), [("txt", 1), ("json", 2)])
def test_captions(kind: str, texts: int, tmp_path: Path) -> None:
    data = load_data(config(write_shards(tmp_path, kind), labels="none"))
    assert data.spec.class_names == ()
    assert {len(captions) for captions in data.captions} == {texts}
    for name, label in zip(data.train.names, data.train.labels, strict=True):
        number = int(name.partition("/")[2].removesuffix(".png"))
        assert data.captions[label][0] == f"a {number % 3}"


def test_classes_go_before_captions(tmp_path: Path) -> None:
    data = load_data(config(write_shards(tmp_path, "cls", "txt")))
    assert not data.captions
    assert any("data.labels=none takes captions" in warning for warning in data.warnings)


def test_ways_to_name_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", "cls")
    every = sorted(folder.iterdir())
    (folder / "readme.txt").write_text("no shard")
    assert [shard.path for shard in find_shards(folder)] == every
    assert [shard.path for shard in find_shards(folder / "part-{000..002}.tar")] == every
    assert [shard.path for shard in find_shards(folder / "part-{001..002}.tar")] == every[1:]
    assert [shard.path for shard in find_shards(every[0])] == every[:1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such shard"),
        ("part-{000..009}.tar", "part-003.tar: no such shard"),
        ("part-{2..1}.tar", "the lower number first"),
        ("part-{0..99999999999}.tar", "expected a range"),
    ],
)
def test_shards_that_are_not_there(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(config(write_shards(tmp_path, "cls") / name))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards; expected files that end in"):
        load_data(config(tmp_path))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """But for the zeros at the end of a tar file, which hold nothing."""
    shard = write_shards(tmp_path / "data", "cls", shards=1, samples=3) / "part-000.tar"
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in range(1, end, 97):
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not readable as a tar file"):
            load_data(config(shard))


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{suffix}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="not readable as a tar file without compression"):
        load_data(config(path))


BAD = {
    "two images": ({"a.png": png(0), "a.jpg": b"x"}, "a second image of the same sample"),
    "an empty caption": ({"a.png": png(0), "a.txt": b" "}, "the caption is empty"),
    "a caption that is not UTF-8": ({"a.png": png(0), "a.txt": b"\xff"}, "can't decode"),
    "JSON that is none": ({"a.png": png(0), "a.json": b"{"}, "a.json"),
    "JSON that is a list": ({"a.png": png(0), "a.json": b"[]"}, "expected an object"),
    "a label that is a list": ({"a.png": png(0), "a.json": b'{"label": []}'}, "neither text nor an integer"),
    "a text of megabytes": ({"a.png": png(0), "a.txt": b"x" * 2**21}, "expected at most"),
    "an image that is none": ({"a.png": b"no image"}, "a.png"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_members_are_named(what: str, tmp_path: Path) -> None:
    members, message = BAD[what]
    write_shards(tmp_path, "cls")
    write_shard(tmp_path / "part-999.tar", members)
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path))


def test_links_and_names_that_lead_outside_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(99))
    write_shards(tmp_path / "data", "cls")
    with tarfile.open(tmp_path / "data" / "part-999.tar", "w") as archive:
        for number, target in enumerate((str(tmp_path / "secret.png"), "../secret.png")):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        outside = tarfile.TarInfo("../../outside.png")
        outside.size = len(png(1))
        archive.addfile(outside, io.BytesIO(png(1)))
        label = tarfile.TarInfo("../../outside.cls")
        label.size = 1
        archive.addfile(label, io.BytesIO(b"a"))
    data = load_data(config(tmp_path / "data"))
    names = [*data.train.names, *data.val.names]
    assert len(names) == SHARDS * SAMPLES + 1
    assert [name for name in names if "999" in name] == ["part-999.tar/../../outside.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret.png"]


def test_training_is_that_on_a_folder(tmp_path: Path) -> None:
    """Images in the same order give the same losses, read from shards at every access or kept in memory."""
    write_shards(tmp_path / "shards", "cls")
    for number in range(SHARDS * SAMPLES):
        file = tmp_path / "folder" / f"{number:04d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(number))
    rows = "".join(f"{number:04d}.png,{'abc'[number % 3]}\n" for number in range(SHARDS * SAMPLES))
    (tmp_path / "folder" / "metadata.csv").write_text("file_name,label\n" + rows)
    small = {"model__variant": "unet-conv", "model__channel_mult": [1], "training__steps": 4, "training__log_every": 1}
    found = {}
    for source, name in (("webdataset", "shards"), ("images", "folder")):
        for limit in (4.0, 1e-9):
            run = tmp_path / f"{source} {limit}"
            data = {"data__source": source, "data__path": str(tmp_path / name), "data__memory_limit_gb": limit}
            train(tiny_config(run, data__val_fraction=0.0, **small, **data), quiet=True)
            found[source, limit] = losses_of(run)
    assert len(set(map(tuple, found.values()))) == 1
