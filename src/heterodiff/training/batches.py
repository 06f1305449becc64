"""Images of each batch: a pure function of the seed and the step, so there is no state to lose.

Order, augmentation, noise and dropout are drawn from seeds derived from (run seed, step); a resumed run, or one with
another number of processes or loader workers, therefore sees exactly the same data.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from heterodiff.config import DataConfig
from heterodiff.data.augment import augment
from heterodiff.data.dataset import ImageDataset
from heterodiff.errors import DataError


class Stream(IntEnum):
    """Independent streams of random numbers of a run."""

    ORDER = 0
    AUGMENT = 1
    NOISE = 2
    DROPOUT = 3
    PREVIEW = 4
    VALIDATION = 5
    PRIOR = 6


def derive_seed(seed: int, stream: Stream, *position: int) -> int:
    """Return a 63-bit seed for ``position`` (a step, a rank, ...) of one ``stream`` of the run with ``seed``."""
    sequence = np.random.SeedSequence([seed & 0xFFFFFFFF, int(stream), *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class Batch:
    """One process's share of a step.

    Attributes:
        stored: images (B, C, H, W) as :meth:`ImageDataset.stored` gives them, augmented; None if all images are on the
            device already.
        labels: (B,), or with attributes (B, 1 + A), see :meth:`ImageDataset.conditions_of`.
        indices: of the images in the data set.
        seeds: of their augmentation.
    """

    stored: Tensor | None
    labels: Tensor
    indices: list[int]
    seeds: list[int]

    def pin_memory(self) -> "Batch":
        """Copy to memory from which copies to a device run beside other work; called by the loader."""
        stored = None if self.stored is None else self.stored.pin_memory()
        return replace(self, stored=stored, labels=self.labels.pin_memory())


class BatchOrder:
    """Positions of the images of each step; every image is used exactly once an epoch, in a new order each time.

    Batches run on across the end of an epoch, so none is short.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # The legacy generator: its stream is frozen, so a run can go on under another NumPy version.
            rng = np.random.RandomState(derive_seed(self.seed, Stream.ORDER, epoch) & 0xFFFFFFFF)
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = rng.permutation(self.length)
        return self._epochs[epoch]

    def indices(self, step: int) -> list[int]:
        """Indices of the whole batch of ``step`` (0-based)."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._epoch(p // self.length)[p % self.length]) for p in positions]


def share_of(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the rows of a batch that process ``rank`` computes."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class StepBatches(Dataset[Batch | DataError]):
    """Batches of one process: item ``step`` is its share of that step's batch.

    Args:
        data: the training images.
        config: settings of the augmentation.
        batch_size: over all processes.
        with_images: whether items hold images.
    """

    def __init__(
        self,
        data: ImageDataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        with_images: bool = True,
    ):
        self.data, self.config, self.seed, self.with_images = data, config, seed, with_images
        self.order = BatchOrder(len(data), batch_size, seed)
        self.share = share_of(batch_size, rank, world_size)

    def __getitem__(self, step: int) -> Batch | DataError:
        """Return the share of ``step``, or the error of an image: raised in a worker, it would carry a traceback."""
        try:
            return self.batch(step)
        except DataError as error:
            return error

    def batch(self, step: int) -> Batch:
        """Return the share of ``step``. Raises DataError if an image can no longer be read."""
        indices = self.order.indices(step)[self.share]
        offset = step * self.order.batch_size + self.share.start
        seeds = [derive_seed(self.seed, Stream.AUGMENT, offset + i) for i in range(len(indices))]
        stored = augment(self.data.stored(indices), seeds, self.config) if self.with_images else None
        return Batch(stored, self.data.conditions_of(indices), indices, seeds)
