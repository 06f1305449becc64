"""The training images of a run, on its device."""

import signal
from collections.abc import Generator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from heterodiff.config import RunConfig
from heterodiff.data.augment import augment
from heterodiff.data.dataset import ImageDataset
from heterodiff.devices import free_memory, pins_memory, send
from heterodiff.errors import DataError, RunError, reason
from heterodiff.training.batches import Batch, StepBatches
from heterodiff.training.interrupt import ignore_signals

KEPT_SHARE = 0.1
"""Share of a device's free memory that images may take with ``keep_on_device: auto``; the memory plan leaves it."""
COPIED_AT_ONCE = 1024


class Feed:
    """The training images of a run, batch by batch.

    Images are copied to the device as they are stored (bytes take a quarter of floats) and become floats there. A set
    that fits stays on the device, see ``data.keep_on_device``; then only the indices of a batch are copied.

    Args:
        rank, world_size: which share of every batch.
    """

    def __init__(self, config: RunConfig, data: ImageDataset, device: torch.device, rank: int = 0, world_size: int = 1):
        self.config, self.data, self.device = config, data, device
        self._kept = self._upload() if self._keeps() else None
        training = config.training
        self._batches = StepBatches(
            data, config.data, training.batch_size, training.seed, rank, world_size, with_images=self._kept is None
        )

    def _keeps(self) -> bool:
        wanted, size = self.config.data.keep_on_device, self.data.bytes_in_memory()
        if self.device.type == "cpu" or size is None:
            return False
        return wanted is True or (wanted == "auto" and size <= KEPT_SHARE * free_memory(self.device)[0])

    def _upload(self) -> Tensor:
        parts = [
            self.data.stored(range(k, min(k + COPIED_AT_ONCE, len(self.data)))).to(self.device)
            for k in range(0, len(self.data), COPIED_AT_ONCE)
        ]
        return torch.cat(parts)

    def loader(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield the batches of steps ``start`` (0-based) to ``stop``, ``stop`` excluded.

        Raises:
            DataError: an image can no longer be read.
            RunError: a worker process has ended.
        """
        workers = self.config.training.num_workers if self._kept is None else 0
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,
            pin_memory=pins_memory(self.device),
        )
        watched = workers > 0 and hasattr(signal, "SIGCHLD")
        before = signal.getsignal(signal.SIGCHLD) if watched else None
        batches = iter(loader)
        if watched:  # torch would raise the death of a worker anywhere, perhaps between two halves of an update
            signal.signal(signal.SIGCHLD, before)
        try:
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a process that loads images has ended ({reason(error)}), as when memory runs out; start the same "
                f"command again, or with training.num_workers={max(0, workers - 1)}"
            ) from None
        finally:
            del batches, loader  # ends the workers, which a traceback would keep alive, and the exit waits for them

    def batch(self, step: int) -> Batch:
        """Return the batch of one step."""
        return self._batches.batch(step)

    def images(self, batch: Batch, rows: slice) -> Tensor:
        """Return images ``rows`` of ``batch`` on the device, (B, C, H, W) float32 in [0, 1], or stored latents."""
        if batch.stored is not None:
            return self.data.to_images(send(batch.stored[rows], self.device))
        assert self._kept is not None
        indices = send(torch.tensor(batch.indices[rows]), self.device)
        return self.data.to_images(augment(self._kept[indices], batch.seeds[rows], self.config.data))
