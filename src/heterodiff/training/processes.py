"""The processes of one run, and what they agree on without waiting for a device."""

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from heterodiff.devices import LONGEST_WAIT, process_state
from heterodiff.errors import ConfigError

SMALLEST_BLOCK = 100_000
"""Parameters of the smallest block that is gathered on its own; smaller ones cost more messages than memory."""
REFUSED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def is_main_process() -> bool:
    """Return whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def make_accelerator() -> Accelerator:
    """Return accelerate's view of this run, on the device of this process.

    Raises:
        ConfigError: another way to split networks over processes than ``training.fsdp``.
    """
    process_state()  # chooses the device
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.distributed_type in REFUSED:
        raise ConfigError(
            f"distributed type {accelerator.distributed_type.value}: set training.fsdp=true in place of it; run "
            "`accelerate config` again and choose multi-GPU (DDP), or use torchrun"
        )
    return accelerator


def split_weights(network: nn.Module) -> nn.Module:
    """Split the weights of ``network``, in place, over all processes: each keeps a part of every tensor's rows.

    Blocks are gathered one after the other when they compute (FSDP2, Zhao et al., arXiv:2304.11277, by parameter).
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # rows in one piece, whatever layout convolutions like
    for block in _blocks(network):
        if sum(parameter.numel() for parameter in block.parameters()) >= SMALLEST_BLOCK:
            fully_shard(block)
    fully_shard(network)
    return network


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield what stands in the lists of ``network``, and in lists of lists."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from _blocks(child)
        elif isinstance(network, nn.ModuleList):
            yield child


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be split over the processes; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process keeps; it may have none."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather_into(network: nn.Module | None, split: nn.Module, values: Sequence[Tensor]) -> None:
    """Put ``values`` for the parameters of ``split``, and its buffers, into ``network``, one tensor after the other.

    Args:
        network: of the same kind, whole; None in processes that only send their parts.
    """
    targets = [None] * len(values) if network is None else list(network.parameters())
    for value, target in zip(values, targets, strict=True):
        gathered = whole(value)
        if target is not None:
            target.copy_(gathered)
    if network is not None:
        for buffer, values_of in zip(network.buffers(), split.buffers(), strict=True):
            buffer.copy_(values_of)


@torch.no_grad()
def put(values: Tensor, target: Tensor) -> None:
    """Copy ``values``, which are whole, into ``target``, which may be split over the processes."""
    if isinstance(target, DTensor):
        parts = values.chunk(target.device_mesh.size())  # may be fewer than there are processes
        rank = target.device_mesh.get_local_rank()
        values = parts[rank] if rank < len(parts) else values[:0]
    own_part(target).copy_(values)


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
