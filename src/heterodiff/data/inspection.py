"""One pass over all images: which are usable, what they hold, and a copy in memory when it fits."""

import math
import os
from collections import Counter
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
class Survey:
    """Result of the pass; ``images`` in row order, all with the channels and number type of the first."""

    images: tuple[Measured, ...]
    bad: tuple[DataFinding, ...]
    dtypes: Counter[str]
    dtype: str
    size: tuple[int, int]
    store: ImageStore | None
    fits_memory: bool

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many images have which stored (height, width)."""
        return Counter((image.shape[1], image.shape[2]) for image in self.images)


@dataclass(frozen=True)
class Known:
    """Images that a run has measured before: their names, and the specification that all of them have."""

    names: frozenset[str]
    spec: ImageSpec

    def fits(self, config: DataConfig) -> bool:
        """Whether the settings still ask for images like these."""
        size, channels = (self.spec.height, self.spec.width), self.spec.channels
        return config.image_size in (None, size) and config.channels in (None, channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.spec.channels, self.spec.height, self.spec.width


class _Surveyor:
    """Reads rows, in threads after the first usable one, which fixes channels and number type."""

    def __init__(
        self, collection: Collection, config: DataConfig, keep: bool, moments: bool, known: Known | None
    ) -> None:
        self.collection = collection
        self.reader = ImageReader(collection.read, config.image_size, config.resize)
        self.channels = config.channels
        self.limit_bytes = config.memory_limit_gb * 1e9
        self.keep = keep
        self.fits = False
        self.moments = moments
        self.first: tuple[str, np.dtype, tuple[int, ...]] | None = None
        self.kept: np.ndarray | None = None
        self.dtypes: Counter[str] = Counter()
        self.known: Known | None = None
        if known is not None and known.fits(config):
            dtype = np.dtype(known.spec.dtype)
            if len(collection.names) * math.prod(known.shape) * dtype.itemsize > self.limit_bytes:
                self.known, self.first = known, (collection.names[0], dtype, known.shape)

    def _refuse_unlike_first(self, image: np.ndarray) -> None:
        channels, dtype = self.channels, None
        source = "data.channels says"
        if self.first is not None:
            name, dtype, shape = self.first
            if channels is None:
                channels, source = shape[0], f"the first image ({name}) has"
        if channels is not None and image.shape[0] != channels:
            found = "1 channel" if image.shape[0] == 1 else f"{image.shape[0]} channels"
            raise BadImage(f"{found}, {source} {channels}")
        if dtype is not None and image.dtype != dtype:
            raise BadImage(f"values of type {image.dtype}, the first image ({name}) has {dtype}")

    def _accept_first(self, row: int, image: np.ndarray) -> None:
        fitted = self.reader.fit(image)
        self.first = (self.collection.names[row], fitted.dtype, fitted.shape)
        count = len(self.collection.names)
        self.fits = count * fitted.nbytes <= self.limit_bytes
        if self.keep and self.fits:
            self.kept = np.empty((count, *fitted.shape), fitted.dtype)

    def measure(self, row: int) -> Measured | DataFinding:
        """Read ``row`` once: check, measure and keep it. A known image that is not kept need not be read."""
        if self.known is not None and self.collection.names[row] in self.known.names:
            return Measured(row, self.known.shape, *self.known.spec.value_range)
        try:
            image = self.collection.read(row)
            self.dtypes[image.dtype.name] += 1
            self._refuse_unlike_first(image)
            self.reader.check_shape(image.shape)
        except BadImage as reason:
            return DataFinding(self.collection.names[row], str(reason))
        if self.first is None:
            self._accept_first(row, image)
        if self.kept is not None:
            fitted = self.reader.fit(image)
            if fitted.shape == self.kept.shape[1:]:  # otherwise sizes differ, which the caller reports for all
                self.kept[row] = fitted
        low, high = float(image.min()), float(image.max())
        if not self.moments:
            return Measured(row, image.shape, low, high)
        values = image.astype(np.float64)
        return Measured(row, image.shape, low, high, float(values.mean()), float(np.square(values).mean()))

    def run(self) -> Iterator[Measured | DataFinding]:
        """Yield the results in row order."""
        count, row = len(self.collection.names), 0
        while row < count and self.first is None:
            yield self.measure(row)
            row += 1
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(row, count, _WINDOW):
                yield from pool.map(self.measure, range(start, min(start + _WINDOW, count)))


def survey_images(
    collection: Collection, config: DataConfig, *, keep: bool, moments: bool = False, known: Known | None = None
) -> Survey:
    """Read every image of ``collection`` once.

    Args:
        keep: hold the decoded images in memory if they fit ``config.memory_limit_gb``.
        moments: also measure mean and mean square (slower).
        known: images of a run that goes on. Where memory does not hold them, they are not read before they are used.
    """
    surveyor = _Surveyor(collection, config, keep, moments, known)
    images: list[Measured] = []
    bad = list(collection.unreadable)
    total = len(collection.names)
    with progress_tasks(quiet=total <= PROGRESS_FROM) as task:
        done = task("reading images", total)
        for count, result in enumerate(surveyor.run(), start=1):
            done(count)
            if isinstance(result, Measured):
                images.append(result)
            else:
                bad.append(result)
    if surveyor.first is None:
        return Survey((), tuple(bad), surveyor.dtypes, "", (0, 0), None, False)
    _, dtype, shape = surveyor.first
    lazy = LazyStore(surveyor.reader, collection.names, collection.where, shape, dtype)
    store = lazy if surveyor.kept is None else MemoryStore(surveyor.kept)
    return Survey(tuple(images), tuple(bad), surveyor.dtypes, dtype.name, (shape[1], shape[2]), store, surveyor.fits)
