"""Images in memory or decoded at each access, behind one interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from heterodiff.data.decoding.resize import Size, covering_size, resize_image
from heterodiff.data.findings import BadImage, show
from heterodiff.errors import DataError
from heterodiff.image_spec import ImageSpec


class ImageStore(Protocol):
    """Rows of images of one shape and number type."""

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return images ``rows`` as (B, C, H, W) in their stored number type."""


@dataclass(frozen=True)
class MemoryStore:
    """Images decoded once: ``images`` (N, C, H, W)."""

    images: np.ndarray

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        return self.images[rows]


@dataclass(frozen=True)
class ImageReader:
    """Decode and resize one row, for the memory and the lazy store alike.

    Attributes:
        read: row -> (C, H, W) as stored.
        size: (height, width) to resize to, ``None`` = as stored.
        condition: row -> condition image (C', H, W), stored behind the channels of the image.
        given: channels of the image that are its condition; they come last.
    """

    read: Callable[[int], np.ndarray]
    size: Size | None
    resize: Literal["crop", "stretch"]
    condition: Callable[[int], np.ndarray] | None = None
    given: tuple[int, ...] = ()

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``BadImage`` if an image of ``shape`` (C, H, W) cannot be brought to the wanted size."""
        if self.size is not None and self.resize == "crop":
            covering_size(shape, self.size)

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Return ``image`` (C, H, W) at the wanted size."""
        return image if self.size is None else resize_image(image, self.size, self.resize)

    def with_condition(self, row: int, image: np.ndarray) -> np.ndarray:
        """Return ``image`` (C, H, W) of ``row`` with its condition as last channels.

        Raises:
            BadImage: a condition image that is missing, or of another size or number type; too few channels.
        """
        if self.given:
            if max(self.given) >= len(image):
                raise BadImage(f"data.condition.channels asks for channel {max(self.given)}, it has {len(image)}")
            drawn = [channel for channel in range(len(image)) if channel not in self.given]
            return image[[*drawn, *self.given]]
        if self.condition is None:
            return image
        beside = self.condition(row)
        for what, own, found in (("size", image.shape[1:], beside.shape[1:]), ("type", image.dtype, beside.dtype)):
            if own != found:
                shown = ["x".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in (own, found)]
                raise BadImage(f"its condition image has the {what} {shown[1]}, the image itself {shown[0]}")
        return np.concatenate([image, beside])


@dataclass(frozen=True)
class LazyStore:
    """Images decoded at every access, for data sets larger than memory."""

    reader: ImageReader
    names: tuple[str, ...]
    where: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def _read(self, row: int) -> np.ndarray:
        try:
            image = self.reader.fit(self.reader.with_condition(row, self.reader.read(row)))
        except BadImage as reason:
            raise DataError(
                f"{self.where}: {show(self.names[row])} can no longer be read: {reason}; restore the file"
            ) from None
        if image.shape != self.shape or image.dtype != self.dtype:
            raise DataError(
                f"{self.where}: {show(self.names[row])} has changed: expected {self.shape} {self.dtype}, "
                f"found {image.shape} {image.dtype}; restore the file or start again"
            )
        return image

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) == 0:
            return np.empty((0, *self.shape), self.dtype)
        return np.stack([self._read(int(row)) for row in rows])


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """Images with labels; items are float32 (C, H, W) in [0, 1] and the class index (-1 = unlabelled).

    Args:
        spec: shape, classes and value range of the images.
        store: holds the images, and perhaps others.
        rows: rows of ``store`` that make up this data set.
        names: name of each image (file name relative to the data folder, or index).
        labels: class index of each image, -1 = unlabelled.
        attributes: (N, A), see :mod:`heterodiff.data.attributes`; None without.
    """

    def __init__(
        self,
        spec: ImageSpec,
        store: ImageStore,
        rows: np.ndarray,
        names: list[str],
        labels: np.ndarray,
        attributes: np.ndarray | None = None,
    ) -> None:
        assert len(rows) == len(names) == len(labels)
        self.spec = spec
        self.names = names
        self.labels = np.asarray(labels, dtype=np.int64)
        self.attributes = attributes
        self._store = store
        self._rows = np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def take(self, indices: Sequence[int]) -> "ImageDataset":
        """Return a data set of the images ``indices`` alone."""
        chosen = np.asarray(indices, dtype=np.int64)
        names = [self.names[index] for index in chosen]
        attributes = None if self.attributes is None else self.attributes[chosen]
        return type(self)(self.spec, self._store, self._rows[chosen], names, self.labels[chosen], attributes)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (B, C, H, W) float32 in [0, 1] and labels (B,) int64 of ``indices``.

        Raises:
            IndexError: an index is out of range.
            DataError: a file that is decoded on access has become unreadable or has changed.
        """
        images = self.to_images(self.stored(indices))
        return (images if self.spec.condition is None else images[:, : self.spec.channels]), self.labels_of(indices)

    def inputs(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what training sees: images with stored condition images behind their channels, and conditions."""
        return self.to_images(self.stored(indices)), self.conditions_of(indices)

    def conditions_of(self, indices: Sequence[int]) -> torch.Tensor:
        """Return labels (B,) int64, or with attributes (B, 1 + A) float32: the label, then the attributes."""
        labels = self.labels_of(indices)
        if self.attributes is None:
            return labels
        attributes = torch.from_numpy(self.attributes[np.asarray(indices, dtype=np.int64)])
        return torch.cat([labels[:, None].float(), attributes], dim=1)

    def stored(self, indices: Sequence[int]) -> torch.Tensor:
        """Return images (B, C, H, W) of ``indices`` with their stored values: as bytes, or else as floats.

        Raises:
            IndexError, DataError: as :meth:`batch`.
        """
        images = torch.from_numpy(self._store.read_rows(self._rows[np.asarray(indices, dtype=np.int64)]))
        return images if images.dtype in (torch.uint8, torch.bool) else images.float()

    def to_images(self, stored: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`stored` gave as float32 in [0, 1], on the device where it is."""
        low, high = self.spec.value_range
        return stored.to(torch.float32, copy=True).sub_(low).div_(high - low).clamp_(0.0, 1.0)

    def labels_of(self, indices: Sequence[int]) -> torch.Tensor:
        """Return labels (B,) int64 of ``indices``."""
        return torch.from_numpy(self.labels[np.asarray(indices, dtype=np.int64)])

    def bytes_in_memory(self) -> int | None:
        """Return the size of all images as :meth:`stored` gives them; None if they are read at every access."""
        if not isinstance(self._store, MemoryStore):
            return None
        return self.stored(range(min(1, len(self)))).nbytes * len(self)
