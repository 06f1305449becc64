"""The source ``webdataset``: images with classes or captions in tar files, read where they lie.

A sample is the members of one shard that share a name up to its first dot: an image, and perhaps ``.cls`` (a class),
``.txt`` (a caption) or ``.json`` (both). Each shard is listed once; images are then read at their place in it, in any
order, so a run that goes on has the same order to the sample. Shards may lie on a web server.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.captions import clean_caption
from heterodiff.data.collection import Collection
from heterodiff.data.decoding import SUFFIXES, decode_stream
from heterodiff.data.decoding.remote import BUFFER_BYTES, RemoteFile, remote_url, shown_url
from heterodiff.data.findings import BadImage, DataFinding, show
from heterodiff.data.sources.metadata import class_name
from heterodiff.errors import DataError, reason
from heterodiff.progress import progress_tasks

MAX_TEXT_BYTES = 2**20
"""Largest class, caption or JSON member that is read."""
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS, PROGRESS_FROM = 1_000_000, 20


@dataclass(frozen=True)
class Shard:
    """A tar file: on this machine, or at the address ``url``."""

    path: Path
    url: str | None = None

    @property
    def name(self) -> str:
        return self.path.name if self.url is None else shown_url(self.url).rpartition("/")[2]

    def __str__(self) -> str:
        return str(self.path) if self.url is None else shown_url(self.url)

    def open(self) -> Any:
        """Open it for reading bytes, without a buffer where it is remote."""
        return self.path.open("rb") if self.url is None else RemoteFile(self.url)

    def size(self) -> int:
        return self.path.stat().st_size if self.url is None else RemoteFile(self.url).size


@dataclass
class Sample:
    """Contents of one sample; ``image`` is (suffix, first byte, bytes)."""

    image: tuple[str, int, int] | None = None
    label: str | None = None
    captions: list[str] = field(default_factory=list)
    problem: str | None = None


def open_webdataset(config: DataConfig) -> Collection:
    """List the samples of the shards at ``config.path``: a tar file, a folder of them, or ``name-{000..031}.tar``.

    Raises:
        DataError: no shards, or one that is damaged, compressed, or holds no images.
    """
    assert config.path is not None
    shards = find_shards(config.path.expanduser())
    names: list[str] = []
    places: list[tuple[int, str, int, int]] = []
    samples: list[Sample] = []
    problems: list[DataFinding] = []
    left_out = 0
    with progress_tasks(quiet=len(shards) < PROGRESS_FROM) as task:
        done = task("listing shards", len(shards))
        for number, shard in enumerate(shards):
            for key, sample in list_samples(shard, config).items():
                name = f"{shard.name}/{key}"
                if sample.problem is not None:
                    problems.append(DataFinding(name, sample.problem))
                elif sample.image is None:
                    left_out += 1
                else:
                    names.append(name + sample.image[0])
                    places.append((number, *sample.image))
                    samples.append(sample)
            done(number + 1)
    where = str(config.path) if shards[0].url is None else str(shards[0])  # an address may hold secrets
    if not names and not problems:
        raise DataError(f"{where}: no images in {len(shards)} shards; expected members of type {', '.join(SUFFIXES)}")
    labelled = config.labels != "none" and any(sample.label is not None for sample in samples)
    captioned = not labelled and bool(samples) and all(sample.captions for sample in samples)
    warnings = []
    if left_out:
        warnings.append(f"{left_out:,} samples hold no image and were left out")
    if labelled and any(sample.captions for sample in samples):
        warnings.append("classes are used, and captions are not; data.labels=none takes captions in their place")
    return Collection(
        where=where,
        names=tuple(names),
        class_of=tuple(sample.label if labelled else None for sample in samples),
        read=partial(read_sample, tuple(shards), tuple(places), config.channels, config.background),
        problems=tuple(problems),
        warnings=tuple(warnings),
        captions=tuple(tuple(dict.fromkeys(sample.captions)) for sample in samples) if captioned else None,
    )


def find_shards(path: Path) -> list[Shard]:
    """Return the tar files that ``path`` names, in order; those on a web server are not asked for yet.

    Raises:
        DataError: there are none, or one is missing.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix == ".tar" and file.is_file())
        if not found:
            raise DataError(f"{path}: no shards; expected files that end in .tar, which are not compressed")
        return [Shard(file) for file in found]
    found = list(_expanded(path))
    if remote_url(path) is not None:
        return [Shard(shard, remote_url(shard)) for shard in found]
    if missing := next((shard for shard in found if not shard.is_file()), None):
        raise DataError(f"{missing}: no such shard; give a .tar file, a folder of them, or name-{{000..031}}.tar")
    return [Shard(file) for file in found]


def _expanded(path: Path) -> Iterator[Path]:
    """Yield the files of a name with ``{000..031}``."""
    match = BRACES.search(path.name)
    if match is None:
        yield path
        return
    first, last = match.groups()
    if not int(first) <= int(last) < int(first) + MAX_SHARDS:
        raise DataError(f"{path}: expected a range such as {{000..031}}, the lower number first")
    for number in range(int(first), int(last) + 1):
        yield path.with_name(f"{path.name[: match.start()]}{number:0{len(first)}d}{path.name[match.end() :]}")


def list_samples(shard: Shard, config: DataConfig) -> dict[str, Sample]:
    """Return the samples of a shard by their names, in its order; nothing is unpacked.

    Raises:
        DataError: damaged, cut off, compressed, or not sent by its server.
    """
    samples: dict[str, Sample] = {}
    try:
        size = shard.size()
        file = shard.open()
    except OSError as error:
        raise DataError(
            f"{shard}: cannot be read: {error.strerror or error}; correct data.path, or try again"
        ) from None
    try:
        with io.BufferedReader(file, BUFFER_BYTES) as buffered, tarfile.open(fileobj=buffered, mode="r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue  # folders; links could lead anywhere
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, file = member.name.rpartition("/")
                stem, _, kind = file.partition(".")
                if not stem or not kind:
                    continue
                sample = samples.setdefault(f"{folder}/{stem}".lstrip("/"), Sample())
                try:
                    _add(sample, kind.lower(), member, archive, config)
                except ValueError as error:
                    sample.problem = f"{show(member.name)}: {error}"
            _refuse_cut_off(buffered, archive.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError, OverflowError) as error:
        raise DataError(
            f"{shard}: not readable as a tar file without compression: {reason(error)}; write the shard again"
        ) from None
    return samples


def _refuse_cut_off(file: Any, end: int) -> None:
    """Check that a block of zeros, the mark of the end, follows the last member: tarfile stops at anything else."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"cut off or damaged at byte {end:,}")


def _add(sample: Sample, kind: str, member: tarfile.TarInfo, archive: tarfile.TarFile, config: DataConfig) -> None:
    """Add a member to its sample; raises ValueError if it cannot be used."""
    if f".{kind}" in SUFFIXES:
        if sample.image is not None:
            raise ValueError("a second image of the same sample; give each its own name")
        sample.image = (f".{kind}", member.offset_data, member.size)
    elif kind in ("cls", "txt", "json"):
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f"{member.size:,} bytes; expected at most {MAX_TEXT_BYTES:,}")
        file = archive.extractfile(member)
        assert file is not None
        text = file.read().decode("utf-8")
        if kind == "cls":
            sample.label = class_name(text)
        elif kind == "txt":
            sample.captions.append(clean_caption(text))
        else:
            _add_json(sample, json.loads(text), config)


def _add_json(sample: Sample, content: Any, config: DataConfig) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    if "label" in content and config.labels != "none":
        sample.label = class_name(content["label"])
    for key in (config.text_column, "caption"):
        texts = content.get(key, [])
        sample.captions += [clean_caption(text) for text in (texts if isinstance(texts, list) else [texts])]


def read_sample(
    shards: tuple[Shard, ...],
    places: tuple[tuple[int, str, int, int], ...],
    channels: int | None,
    background: str,
    row: int,
) -> np.ndarray:
    """Decode the image of sample ``row``: (number of its shard, suffix, first byte, bytes)."""
    number, suffix, start, size = places[row]
    try:
        with shards[number].open() as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    if len(content) < size:
        raise BadImage(f"truncated: {size - len(content):,} bytes are missing in its shard")
    return decode_stream(io.BytesIO(content), suffix, size, channels, background)
