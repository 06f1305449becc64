"""Latents that another program stored as arrays: read, checked, and written as a folder of ours."""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.codecs.kl_vae import MAX_LOGVAR, MIN_LOGVAR, KLVAECodec, load_vae
from heterodiff.codecs.scaling import LEAST_STD, MOST_STD, measure, scaled_std
from heterodiff.config import DataConfig
from heterodiff.data.decoding import array_names, read_header, read_member
from heterodiff.data.findings import BadImage, show
from heterodiff.data.labels import index_labels
from heterodiff.data.split import draw_split
from heterodiff.errors import DataError, HeterodiffError, reason
from heterodiff.image_spec import ImageSpec
from heterodiff.latents.encode import MAX_FLOAT16, check_out, write_latents
from heterodiff.latents.encode_run import Encoded, describe
from heterodiff.latents.format import Part, Plan
from heterodiff.latents.plan import SAMPLED_IMAGES

SUFFIXES = (".npy", ".npz")
LATENTS = ("latents", "latent", "z", "moments", "posterior", "mean", "x", "arr_0")
LABELS = ("labels", "label", "y", "classes")
"""Names of arrays in npz files; an npz file with a single array other than labels may call it anything."""
READ_KEYS = ("labels", "val_fraction", "split_seed", "memory_limit_gb")
"""Keys of section ``data`` that count here."""


@dataclass(frozen=True)
class ArrayFile:
    """An array of latents.

    Attributes:
        key: name of the array in an npz file; None for npy files.
        shape: as stored, (k, h, w) of one latent or (N, k, h, w).
        labels: class of each latent as text, "" for none; None where the file has no labels.
    """

    path: Path
    key: str | None
    shape: tuple[int, ...]
    labels: tuple[str, ...] | None

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 4 else 1


@dataclass
class ForeignLatents:
    """All latents below a folder, read when they are asked for; at most one array of an npz file is in memory.

    Attributes:
        names: of each latent: its file, and its place in a batch.
        class_of: class of each latent, None where it has none.
        shape: (k, h, w) of each latent.
        limit: bytes that an array of an npz file may take.
    """

    root: Path
    files: list[ArrayFile]
    names: list[str]
    class_of: list[str | None]
    shape: tuple[int, int, int]
    limit: int
    _open: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(file.count for file in self.files)])

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return latents ``rows`` as stored, (B, k, h, w) float32.

        Raises:
            DataError: a file that can no longer be read; NaN or infinite values, or ones that float16 cannot hold.
        """
        found = np.empty((len(rows), *self.shape), np.float32)
        for place, row in enumerate(rows):
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            array = self._array(number)
            found[place] = array if array.ndim == 3 else array[row - self._starts[number]]
        largest = np.abs(found).reshape(len(rows), -1).max(axis=1)  # NaN where anything is
        for good, what in (
            (np.isfinite(largest), "NaN or infinite values"),
            (largest <= MAX_FLOAT16, "values beyond float16"),
        ):
            if not good.all():
                raise DataError(f"{self.root / show(self.names[rows[int(good.argmin())]])}: {what}; leave it out")
        return torch.from_numpy(found)

    def _array(self, number: int) -> np.ndarray:
        if self._open is None or self._open[0] != number:
            self._open = None  # before the next one is read
            self._open = (number, _load(self.files[number], self.limit))
        return self._open[1]


def _load(file: ArrayFile, limit: int) -> np.ndarray:
    def read() -> np.ndarray:
        if file.key is None:
            array: np.ndarray = np.load(file.path, mmap_mode="r", allow_pickle=False)
            return array
        with zipfile.ZipFile(file.path) as archive:
            return read_member(archive, file.key, limit)

    array = _reading(file.path, read)
    if array.shape != file.shape:
        raise DataError(f"{file.path}: has changed: expected the shape {file.shape}, found {array.shape}")
    return array


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """Return what ``read`` reads of a file; raises DataError for whatever is wrong with it."""
    try:
        return read()
    except BadImage as problem:
        raise DataError(f"{path}: {problem}") from None
    except (HeterodiffError, MemoryError):
        raise
    except Exception as error:  # numpy and zipfile raise nearly anything on damaged files
        raise DataError(f"{path}: not readable as an array: {reason(error)}") from None


def open_foreign(root: Path, memory_limit_gb: float = 4.0) -> ForeignLatents:
    """List the latents below ``root``: npy and npz files, each with one latent (k, h, w) or a batch (N, k, h, w).

    Classes are labels in npz files, or else the folders directly below ``root``.

    Args:
        memory_limit_gb: for an array of an npz file, which is read as a whole; npy files are mapped.

    Raises:
        DataError: no such folder or file, nothing usable in it, or latents of different shapes.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder of latents; correct --from")
    folder = root if root.is_dir() else root.parent
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not paths:
        raise DataError(f"{root}: no .npy or .npz files; expected latents (c, h, w), or batches (N, c, h, w)")
    limit = int(memory_limit_gb * 1e9)
    files = [_describe(path, limit) for path in paths]
    names: list[str] = []
    class_of: list[str | None] = []
    for file in files:
        name = file.path.relative_to(folder).as_posix()
        parts = name.split("/")
        inside = parts[0] if len(parts) > 1 else None
        names += [name] if len(file.shape) == 3 else [f"{name}:{k:06d}" for k in range(file.count)]
        class_of += [inside] * file.count if file.labels is None else [label or None for label in file.labels]
    if not names:
        raise DataError(f"{root}: {show(names_of(files))}: empty batches; nothing to store")
    shapes = {file.shape[-3:]: file for file in reversed(files)}
    if len(shapes) > 1:
        (first, one), (second, other) = list(shapes.items())[:2]
        raise DataError(
            f"{root}: latents of different shapes: {first} in {one.path.name}, {second} in {other.path.name}; put "
            "those of each shape into a folder of their own"
        )
    return ForeignLatents(folder, files, names, class_of, files[0].shape[-3:], limit)  # type: ignore[arg-type]


def names_of(files: Sequence[ArrayFile]) -> str:
    return ", ".join(file.path.name for file in files[:3])


def _describe(path: Path, limit: int) -> ArrayFile:
    file: ArrayFile = _reading(path, lambda: _of_npz(path, limit) if path.suffix == ".npz" else _of_npy(path))
    return file


def _of_npy(path: Path) -> ArrayFile:
    with path.open("rb") as file:
        shape, dtype = read_header(file)
        stored = path.stat().st_size - file.tell()
    _refuse_other_arrays(shape, dtype)
    if (needed := math.prod(shape) * dtype.itemsize) > stored:
        raise BadImage(f"truncated: {needed - stored:,} bytes are missing for shape {shape} of {dtype}")
    return ArrayFile(path, None, shape, None)


def _of_npz(path: Path, limit: int) -> ArrayFile:
    with zipfile.ZipFile(path) as archive:
        there = array_names(archive)
        label = next((name for name in LABELS if name in there), None)
        others = [name for name in there if name != label]
        key = next((name for name in LATENTS if name in others), others[0] if len(others) == 1 else None)
        if key is None:
            raise BadImage(f"arrays {there[:5]}; expected one named {', '.join(LATENTS)}, and perhaps {LABELS[0]}")
        with archive.open(f"{key}.npy") as member:
            shape, dtype = read_header(member)
        _refuse_other_arrays(shape, dtype)
        if (needed := math.prod(shape) * dtype.itemsize) > limit:
            raise BadImage(
                f"array '{key}' needs {needed:,} bytes, more than data.memory_limit_gb; save it as an .npy file, which "
                "is read in parts"
            )
        labels = None if label is None else read_member(archive, label, limit)
    count = shape[0] if len(shape) == 4 else 1
    if labels is None:
        return ArrayFile(path, key, shape, None)
    if labels.size != count or labels.dtype.kind not in "iuUS":
        raise BadImage(f"'{label}' holds {labels.size:,} values of {labels.dtype}, expected {count:,} numbers or names")
    texts = [one.decode() if isinstance(one, bytes) else str(one) for one in labels.ravel().tolist()]
    return ArrayFile(path, key, shape, tuple("" if text == "-1" else text for text in texts))


def _refuse_other_arrays(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind != "f":
        raise BadImage(f"values of type {dtype}; latents are floats")
    if len(shape) not in (3, 4) or 0 in shape[-3:]:
        raise BadImage(f"shape {shape}; expected a latent (c, h, w) or a batch (N, c, h, w)")


# ---- as a folder of ours --------------------------------------------------------------------------------------------


def store_foreign(
    root: Path, config: DataConfig, vae_path: Path, out: Path, scale: str | None, batch_size: int, shard_size: int
) -> Encoded:
    """Write the latents of another program below ``root`` to the folder ``out``, to train on with the VAE.

    Latents of twice the VAE's channels are mean and log variance of the posterior. Others have no variance.

    Args:
        config: of which :data:`READ_KEYS` count.
        scale: the latents are multiplied by this number, or are scaled as the VAE says (``vae``); None: they are as
            the VAE gives them.

    Raises:
        CheckpointError: no VAE there, or a damaged one.
        DataError: latents that cannot be read, are not of this VAE's shape or, by their std, of another scale; or
            ``out`` cannot be written.
    """
    check_out(out)
    factor = _read_scale(scale)
    codec = KLVAECodec(load_vae(vae_path))
    latents = open_foreign(root.expanduser(), config.memory_limit_gb)
    channels, (k, height, width) = codec.latent_channels, latents.shape
    if k not in (channels, 2 * channels):
        raise DataError(
            f"{root}: latents of {k} channels; the VAE {vae_path} has {channels} (or {2 * channels}: mean and log "
            "variance)"
        )
    if k == 2 * channels and factor is not None:
        raise DataError(f"{root}: mean and log variance ({k} channels) are as the VAE gives them; leave --scale out")

    def posterior(rows: Sequence[int]) -> Tensor:
        """Mean and std (B, 2 c, h, w)."""
        stored = latents.read(rows)
        if k == 2 * channels:
            mean, logvar = stored.chunk(2, dim=1)
            return torch.cat([mean, torch.exp(0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR))], dim=1)
        mean = codec.unscale(stored) if factor == "vae" else stored / (factor or 1.0)  # type: ignore[operator]
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    sampled = np.unique(np.linspace(0, len(latents.names) - 1, SAMPLED_IMAGES).round().astype(np.int64)).tolist()
    samples = latents.read(sampled)
    if factor is None:
        _refuse_scaled(root, codec, posterior(sampled))
    where = str(root)
    class_of = [None] * len(latents.names) if config.labels == "none" else latents.class_of
    class_names, labels, notes = index_labels(class_of, where, config, None)
    held_out = draw_split(latents.names, labels, config.val_fraction, config.split_seed)
    order = np.concatenate([np.flatnonzero(~held_out), np.flatnonzero(held_out)])
    train, val = (
        Part(names=tuple(latents.names[row] for row in rows), labels=tuple(labels[rows].tolist()))
        for rows in (np.flatnonzero(~held_out), np.flatnonzero(held_out))
    )
    image = (codec.vae.config.in_channels, height * codec.factor, width * codec.factor)
    spec = ImageSpec(image[1], image[2], image[0], class_names, (0.0, 255.0), "uint8")
    content = json.dumps([class_names, latents.names, labels.tolist()]).encode() + samples.numpy().tobytes()
    stored_config = config.model_copy(update={"source": "latents", "path": out.expanduser().absolute()})
    plan = Plan(
        vae_fingerprint=codec.fingerprint(),
        source_fingerprint=hashlib.sha256(content).hexdigest()[:16],
        transform_fingerprint=hashlib.sha256(json.dumps([image, k, str(factor)]).encode()).hexdigest()[:16],
        vae_path=str(vae_path.expanduser().absolute()),
        shape=codec.latent_shape(*image),
        spec=spec.to_dict(),
        data_config=stored_config.model_dump(mode="json"),
        train=train,
        val=val,
        shard_size=shard_size,
    )
    write_latents(plan, lambda part: posterior(order[part.start : part.stop].tolist()), out, batch_size=batch_size)
    if k == channels:
        notes.append("these latents are single draws or means, so training sees the same ones at every step")
    return describe(codec, out, notes)


def _read_scale(scale: str | None) -> float | str | None:
    if scale in (None, "vae"):
        return scale
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise DataError(f"--scale {scale}: expected a number above 0, such as 0.18215, or vae for the VAE's own scale")
    return factor


def _refuse_scaled(root: Path, codec: KLVAECodec, posteriors: Tensor) -> None:
    """Raise DataError for latents whose std says that they are scaled already."""
    mean, std = measure([posteriors], codec.latent_channels)
    found, own = scaled_std(codec, mean, std), float((posteriors.chunk(2, dim=1)[0]).std())
    fits = float(found.min()) >= LEAST_STD and float(found.max()) <= MOST_STD
    if not fits and LEAST_STD <= own <= MOST_STD:
        raise DataError(
            f"{root}: latents of std {own:.2f}, as if scaled already (scaled by the VAE they would have "
            f"{float(found.mean()):.2g}, expected 1); add --scale vae, --scale and the number they were multiplied by, "
            "or --scale 1 if they are as the VAE gives them"
        )
