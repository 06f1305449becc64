"""The processes of one run, and what they agree on without waiting for a device."""

import os
import signal
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

from heterodiff.devices import process_state
from heterodiff.errors import ConfigError

LONGEST_WAIT = timedelta(days=7)
"""Time to wait for a process that previews or writes; a process that dies ends the wait of the others at once."""
REFUSED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def world_size() -> int:
    """Number of processes of this run, as its launcher says, before any of them is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def make_accelerator() -> Accelerator:
    """Return accelerate's view of this run, on the device of this process.

    Raises:
        ConfigError: networks that are split over processes, which checkpoints do not support.
    """
    process_state()  # chooses the device
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.distributed_type in REFUSED:
        raise ConfigError(
            f"distributed type {accelerator.distributed_type.value}: networks are not split over processes yet; run "
            "`accelerate config` again and choose multi-GPU (DDP), or use torchrun"
        )
    return accelerator


class HostGroup:
    """The processes of a run, communicating over the network of their hosts.

    Collectives of the devices would time out while one process draws a preview, and reading their result would wait
    for the device at every step.
    """

    def __init__(self, accelerator: Accelerator):
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        several = self.count > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if several else None

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._group is not None:
            dist.barrier(self._group)

    def largest(self, value: float) -> float:
        """Return the largest ``value`` of all processes."""
        if self._group is None:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return float(number)

    def first_signal(self, received: int | None) -> int | None:
        """Return a signal that any process ``received``, the same in all of them; None if there is none."""
        if self._group is None:
            return received
        number = torch.tensor(received or 0)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)) if number else None
