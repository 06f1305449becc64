"""Reading a folder of stored latents as a data set; `latents.format` describes it, `latents.encode` writes it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from heterodiff.codecs.make import load_saved_codec
from heterodiff.codecs.scaling import LatentCodec
from heterodiff.config import DataConfig
from heterodiff.data.assemble import LatentsInfo, LoadedData
from heterodiff.data.dataset import ImageDataset, ImageSpec, ImageStore, MemoryStore
from heterodiff.data.findings import show
from heterodiff.errors import CheckpointError, DataError
from heterodiff.latents.format import (
    ENCODE_AGAIN,
    INDEX_FILE,
    PLAN_FILE,
    Index,
    read_record,
    read_shard,
    sha256_of,
    shard_name,
    shard_problem,
)


@dataclass(frozen=True)
class ShardStore:
    """Latents read through a memory map of their shards at every access, for data sets larger than memory.

    Maps are opened for a batch and closed after it: there may be more shards than a process may have files, and
    loader workers get no open ones.
    """

    folder: Path
    shard_size: int
    shape: tuple[int, int, int]

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        channels, height, width = self.shape
        posteriors = np.empty((len(rows), 2 * channels, height, width), np.float16)
        shards, places = np.divmod(rows, self.shard_size)
        for number in np.unique(shards):
            path = self.folder / shard_name(int(number))
            try:
                with safe_open(path, "np") as file:
                    mean, std = file.get_slice("mean"), file.get_slice("std")
                    for position in np.flatnonzero(shards == number):
                        row = slice(int(places[position]), int(places[position]) + 1)
                        posteriors[position, :channels] = mean[row][0]
                        posteriors[position, channels:] = std[row][0]
            except (OSError, SafetensorError, ValueError, IndexError) as error:
                raise DataError(f"{path}: can no longer be read: {error}; {ENCODE_AGAIN}") from None
        return posteriors


class LatentDataset(ImageDataset):
    """Stored posteriors with labels, in place of the images they were encoded from.

    ``spec``, ``names`` and ``labels`` are those of the images; items are float32 (2 c, h, w), mean and std as
    `KLVAECodec.posterior` gives them to float16 precision, and the class index (-1 = unlabelled).
    """

    def stored(self, indices: Sequence[int]) -> torch.Tensor:
        """Return posteriors (B, 2 c, h, w) float16 of ``indices``; errors as of :meth:`batch`."""
        chosen = np.asarray(indices, dtype=np.int64)
        posteriors = torch.from_numpy(self._store.read_rows(self._rows[chosen]))
        finite = torch.isfinite(posteriors).flatten(1).all(dim=1)
        if not bool(finite.all()):
            raise DataError(
                f"latents of {show(self.names[chosen[int(finite.int().argmin())]])}: NaN or infinite; {ENCODE_AGAIN}"
            )
        return posteriors

    def to_images(self, stored: torch.Tensor) -> torch.Tensor:
        """Return posteriors as float32."""
        return stored.float()


@dataclass(frozen=True)
class DecodedStore:
    """Images that a codec makes of the means of stored latents, as bytes."""

    latents: ImageStore
    codec: LatentCodec

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        posteriors = torch.from_numpy(self.latents.read_rows(rows)).to(self.codec.device)
        images: np.ndarray = (self.codec.decode(self.codec.draw(posteriors, None)) * 255).round().byte().cpu().numpy()
        return images


def decoded(data: LoadedData, run: Path) -> LoadedData:
    """Return the images that the codec in the folder ``run`` makes of the latents ``data``."""
    codec = load_saved_codec(run)
    if codec is None:
        raise CheckpointError(f"{run}: the folder vae/ is missing; copy it back, or train the run again")
    train, val = (
        ImageDataset(data.spec, DecodedStore(part._store, codec), part._rows, part.names, part.labels)
        for part in (data.train, data.val)
    )
    return replace(data, train=train, val=val, latents=None)


def load_latents(folder: Path, memory_limit_gb: float = 4.0) -> LoadedData:
    """Open a folder that `heterodiff encode` wrote; training and validation images as they were split then.

    Args:
        memory_limit_gb: read all shards into memory, and compare their checksums, when they need at most this; else
            they are read at every access, and sizes and headers are compared.

    Raises:
        DataError: no such folder, one that is not complete, or a file that is missing, damaged or of another format.
    """
    folder = folder.expanduser().absolute()
    index = read_index(folder)
    for number, shard in enumerate(index.shards):
        path = folder / shard.file
        if path.is_file() and path.stat().st_size != shard.bytes:
            raise DataError(f"{path}: expected {shard.bytes:,} bytes, found {path.stat().st_size:,}; {ENCODE_AGAIN}")
        if problem := shard_problem(folder, index, number):
            raise DataError(f"{path}: {problem}; {ENCODE_AGAIN}")
    warnings: tuple[str, ...] = ()
    store: ImageStore
    if sum(shard.bytes for shard in index.shards) <= memory_limit_gb * 1e9:
        store = MemoryStore(_read_all(folder, index))
    else:
        store = ShardStore(folder, index.shard_size, index.shape)
        warnings = ("latents are read at every access: they need more memory than data.memory_limit_gb",)
    spec = ImageSpec.from_dict(index.spec)
    rows, count = np.arange(len(index.names)), len(index.train.names)
    train, val = (
        LatentDataset(spec, store, chosen, list(part.names), np.array(part.labels, dtype=np.int64))
        for part, chosen in ((index.train, rows[:count]), (index.val, rows[count:]))
    )
    info = LatentsInfo(
        folder, index.vae_fingerprint, Path(index.vae_path), index.shape, index.data_config, index.mean, index.std
    )
    return LoadedData(spec, train, val, (), warnings, info)


def read_index(folder: Path) -> Index:
    """Read the index of a folder of latents.

    Raises:
        DataError: no such folder, not complete, or an index that is damaged or of another format.
    """
    if not folder.is_dir():
        what = "a file; expected a folder of latents" if folder.exists() else "no such folder of latents"
        raise DataError(f"{folder}: {what}; correct data.path, or write one with `heterodiff encode`")
    if not (folder / INDEX_FILE).is_file():
        if (folder / PLAN_FILE).is_file():
            raise DataError(f"{folder}: {INDEX_FILE} is missing: encoding did not finish; {ENCODE_AGAIN}")
        raise DataError(f"{folder}: no latents here ({INDEX_FILE} is missing); write them with `heterodiff encode`")
    return read_record(folder / INDEX_FILE, Index)


def _read_all(folder: Path, index: Index) -> np.ndarray:
    """Mean and std (N, 2 c, h, w) float16 of all images."""
    channels, height, width = index.shape
    posteriors = np.empty((len(index.labels), 2 * channels, height, width), np.float16)
    for images, shard in zip(index.ranges, index.shards, strict=True):
        path = folder / shard.file
        if (found := sha256_of(path)) != shard.sha256:
            raise DataError(f"{path}: damaged: expected SHA-256 {shard.sha256:.100}, found {found}; {ENCODE_AGAIN}")
        part = posteriors[images.start : images.stop]
        part[:] = read_shard(path)
        if not np.isfinite(part).all():
            raise DataError(f"{path}: NaN or infinite latents; delete {folder} and encode again")
    return posteriors


def load_stored(config: DataConfig, split: dict[str, Any] | None = None, spec: ImageSpec | None = None) -> LoadedData:
    """Load the latents at ``config.path``; arguments as `sources.load_data`.

    Raises:
        DataError: as `load_latents`; or settings, a split or a specification other than those of the stored latents.
    """
    assert config.path is not None
    data = load_latents(config.path, config.memory_limit_gb)
    assert data.latents is not None
    where = data.latents.folder
    _refuse_other_settings(config, data.latents.data_config, data.spec, where)
    for what, saved, stored in (("specification", spec, data.spec), ("split", split, data.split_to_dict())):
        if saved is not None and saved != stored:
            raise DataError(
                f"{where}: the run's {what} is not that of these latents: they were encoded from other images, or "
                "split otherwise; restore the latents the run began with, or start a new run"
            )
    return data


def _refuse_other_settings(config: DataConfig, stored: dict[str, Any], spec: ImageSpec, where: Path) -> None:
    """Refuse settings that act on images, which have no effect now, unless they are the default or the stored ones."""
    settings, default = (section.model_dump(mode="json") for section in (config, DataConfig()))
    facts = {"image_size": [spec.height, spec.width], "channels": spec.channels, "value_range": list(spec.value_range)}
    for key, value in settings.items():
        if key in ("source", "path", "memory_limit_gb", "keep_on_device") or value == default[key]:
            continue
        if key in ("horizontal_flip", "random_crop"):
            raise DataError(f"data.{key} does not apply to stored latents ({where}); leave it out")
        if value not in (stored.get(key), facts.get(key)):
            raise DataError(
                f"data.{key}={value}: the latents in {where} were encoded with {stored.get(key)}; leave it out, or "
                "encode the images again"
            )
