"""Which images make up each batch: a pure function of the seed and the step, so there is no state to lose.

Order, augmentation, noise and dropout are all drawn from seeds derived from (run seed, step); a resumed run, or
one with another number of processes or loader workers, therefore sees exactly the same data.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from heterodiff.config import DataConfig
from heterodiff.data.augment import augment
from heterodiff.data.dataset import ImageDataset


class Stream(IntEnum):
    """Independent streams of random numbers of a run."""

    ORDER = 0
    AUGMENT = 1
    NOISE = 2
    DROPOUT = 3
    PREVIEW = 4
    VALIDATION = 5


def derive_seed(seed: int, stream: Stream, *position: int) -> int:
    """A 63-bit seed for ``position`` (a step, a rank, ...) of one ``stream`` of the run with ``seed``."""
    sequence = np.random.SeedSequence([seed & 0xFFFFFFFF, int(stream), *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class Batch:
    """One process's share of a step: images (B, C, H, W) in [0, 1], labels (B,), and the indices they came from."""

    images: Tensor
    labels: Tensor
    indices: list[int]


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
    """The rows of a batch that process ``rank`` computes."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class StepBatches(Dataset[Batch]):
    """Item ``step`` is the share of that step's batch that belongs to one process.

    Args:
        data: the training images.
        config: says how to augment.
        batch_size: over all processes.
        rank, world_size: which share.
    """

    def __init__(
        self, data: ImageDataset, config: DataConfig, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.data, self.config, self.seed = data, config, seed
        self.order = BatchOrder(len(data), batch_size, seed)
        self.share = share_of(batch_size, rank, world_size)

    def __getitem__(self, step: int) -> Batch:
        indices = self.order.indices(step)[self.share]
        images, labels = self.data.batch(indices)
        offset = step * self.order.batch_size + self.share.start
        seeds = [derive_seed(self.seed, Stream.AUGMENT, offset + i) for i in range(len(indices))]
        return Batch(augment(images, seeds, self.config), labels, indices)
