"""One pass over all images: which are usable, their values, and a copy in memory when it fits."""

import math
import os
from collections import Counter
from collections.abc import Collection as Container
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.collection import Collection
from heterodiff.data.dataset import ImageReader, ImageSpec, ImageStore, LazyStore, MemoryStore
from heterodiff.data.findings import BadImage, DataFinding
from heterodiff.progress import progress_tasks

PROGRESS_FROM = 2_000
_WINDOW = 1_024
MOST_THREADS, DECODED_BYTES = 8, 2**28
"""Images that are decoded at once: at most this number, and about this many bytes if all are as large as the first."""
_PART = 2**20


@dataclass(frozen=True)
class Measured:
    """One usable image: stored shape (C, H, W), lowest and highest value; mean and mean square if asked for."""

    row: int
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float = math.nan
    mean_square: float = math.nan


@dataclass(frozen=True)
class Inspection:
    """Result of the pass; ``images`` in row order, all with the channels and number type of the first.

    ``kinds`` counts all images that could be decoded by their channels and number type; ``stored_channels`` includes
    those of a condition image.
    """

    images: tuple[Measured, ...]
    bad: tuple[DataFinding, ...]
    kinds: Counter[tuple[int, str]]
    dtype: str
    size: tuple[int, int]
    store: ImageStore | None
    fits_memory: bool
    stored_channels: int = 0

    @property
    def dtypes(self) -> Counter[str]:
        """Number of images of each number type."""
        found: Counter[str] = Counter()
        for (_, dtype), count in self.kinds.items():
            found[dtype] += count
        return found

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """Number of images of each stored (height, width)."""
        return Counter((image.shape[1], image.shape[2]) for image in self.images)


class _Inspector:
    """Reads rows, in threads after the first usable one, which fixes channels and number type."""

    def __init__(self, collection: Collection, config: DataConfig, keep: bool, moments: bool) -> None:
        self.collection = collection
        given = config.condition.channels or () if config.condition else ()
        self.reader = ImageReader(collection.read, config.image_size, config.resize, collection.condition, given)
        self.config = config
        self.keep = keep
        self.moments = moments
        self.fits = False
        self.first: tuple[str, np.dtype, tuple[int, ...]] | None = None
        self.channels = 0
        self.first_bytes = 0
        self.kept: np.ndarray | None = None
        self.kinds: Counter[tuple[int, str]] = Counter()
        self.trusted: Container[str] = ()
        self.spec: ImageSpec | None = None

    def _fits_memory(self, shape: tuple[int, ...], dtype: np.dtype) -> bool:
        size = len(self.collection.names) * math.prod(shape) * dtype.itemsize
        return size <= self.config.memory_limit_gb * 1e9

    def trust(self, names: Container[str], spec: ImageSpec) -> None:
        """Take images ``names`` for images of ``spec`` without reading them, unless all are to be kept in memory."""
        shape, dtype = (spec.stored_channels, spec.height, spec.width), np.dtype(spec.dtype)
        channels = spec.channels + len(self.reader.given)
        as_configured = self.config.image_size in (None, shape[1:]) and self.config.channels in (None, channels)
        if as_configured and not self._fits_memory(shape, dtype):
            self.trusted, self.spec, self.first = names, spec, (self.collection.names[0], dtype, shape)
            self.channels = channels

    def _refuse_unlike_first(self, image: np.ndarray) -> None:
        channels, source = self.config.channels, "data.channels is"
        if channels is None and self.first is not None:
            channels, source = self.channels, f"the first image ({self.first[0]}) has"
        if channels is not None and image.shape[0] != channels:
            found = "1 channel" if image.shape[0] == 1 else f"{image.shape[0]} channels"
            raise BadImage(f"{found}, {source} {channels}")
        if self.first is not None and image.dtype != self.first[1]:
            raise BadImage(f"values of type {image.dtype}, the first image ({self.first[0]}) has {self.first[1]}")

    def _refuse_other_condition(self, image: np.ndarray, complete: np.ndarray) -> None:
        if self.first is not None and len(complete) != self.first[2][0]:
            found, expected = len(complete) - len(image), self.first[2][0] - self.channels
            raise BadImage(f"its condition image has {found} channels, that of the first image has {expected}")

    def measure(self, row: int) -> Measured | DataFinding:
        """Read ``row`` once: check, measure and keep it."""
        name = self.collection.names[row]
        if self.spec is not None and name in self.trusted:
            return Measured(row, (self.channels, self.spec.height, self.spec.width), *self.spec.value_range)
        try:
            image = self.collection.read(row)
            self.kinds[image.shape[0], image.dtype.name] += 1
            self._refuse_unlike_first(image)
            self.reader.check_shape(image.shape)
            complete = self.reader.with_condition(row, image)
            self._refuse_other_condition(image, complete)
        except BadImage as reason:
            return DataFinding(name, str(reason))
        if self.first is None:
            fitted = self.reader.fit(complete)
            self.first, self.first_bytes = (name, fitted.dtype, fitted.shape), complete.nbytes
            self.channels = len(image)
            self.fits = self._fits_memory(fitted.shape, fitted.dtype)
            if self.keep and self.fits:
                self.kept = np.empty((len(self.collection.names), *fitted.shape), fitted.dtype)
        if self.kept is not None:
            fitted = self.reader.fit(complete)
            if fitted.shape == self.kept.shape[1:]:  # otherwise sizes differ, which the caller reports for all
                self.kept[row] = fitted
        low, high = float(image.min()), float(image.max())
        if not self.moments:
            return Measured(row, image.shape, low, high)
        return Measured(row, image.shape, low, high, *_moments(image))

    def run(self) -> Iterator[Measured | DataFinding]:
        """Yield the results in row order."""
        count, row = len(self.collection.names), 0
        while row < count and self.first is None:
            yield self.measure(row)
            row += 1
        at_once = max(1, min(MOST_THREADS, os.cpu_count() or 1, DECODED_BYTES // max(1, self.first_bytes)))
        with ThreadPoolExecutor(at_once) as pool:
            for start in range(row, count, _WINDOW):
                yield from pool.map(self.measure, range(start, min(start + _WINDOW, count)))


def _moments(image: np.ndarray) -> tuple[float, float]:
    """Mean and mean square, without a copy of the whole image in double precision."""
    flat = image.reshape(-1)
    parts = (flat[first : first + _PART].astype(np.float64) for first in range(0, len(flat), _PART))
    sums = np.sum([(part.sum(), np.square(part).sum()) for part in parts], axis=0) / len(flat)
    return float(sums[0]), float(sums[1])


def inspect_images(
    collection: Collection,
    config: DataConfig,
    *,
    keep: bool,
    moments: bool = False,
    trusted: Container[str] = (),
    spec: ImageSpec | None = None,
) -> Inspection:
    """Read every image of ``collection`` once.

    Args:
        keep: hold the decoded images in memory if they fit ``config.memory_limit_gb``.
        moments: also measure mean and mean square (slower).
        trusted: names of images that a run with the specification ``spec`` has inspected before. They are not read
            now if they do not fit into memory.
    """
    inspector = _Inspector(collection, config, keep, moments)
    if spec is not None:
        inspector.trust(trusted, spec)
    images: list[Measured] = []
    bad = list(collection.unreadable)
    total = len(collection.names)
    with progress_tasks(quiet=total <= PROGRESS_FROM) as task:
        done = task("reading images", total)
        for count, result in enumerate(inspector.run(), start=1):
            done(count)
            if isinstance(result, Measured):
                images.append(result)
            else:
                bad.append(result)
    if inspector.first is None:
        return Inspection((), tuple(bad), inspector.kinds, "", (0, 0), None, False)
    _, dtype, shape = inspector.first
    lazy = LazyStore(inspector.reader, collection.names, collection.where, shape, dtype)
    store = lazy if inspector.kept is None else MemoryStore(inspector.kept)
    return Inspection(
        tuple(images), tuple(bad), inspector.kinds, dtype.name, (shape[1], shape[2]), store, inspector.fits, shape[0]
    )
