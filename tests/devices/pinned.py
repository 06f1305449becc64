"""Pinned memory of the host: none is special on a machine without an accelerator, so it is only remembered."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_pinned: dict[int, StorageWeakRef] = {}


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    """Whether the memory of ``tensor``, or that which it is a view of, was pinned."""
    if tensor.device.type != "cpu":
        return False
    found = _pinned.get(tensor.untyped_storage()._cdata)
    return found is not None and not found.expired()


def mark_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Remember the memory of ``tensor`` as pinned as long as it lives."""
    for address in [address for address, memory in _pinned.items() if memory.expired()]:
        del _pinned[address]
    _pinned[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
    return tensor


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Return a copy of a CPU tensor in pinned memory, or the tensor where it is pinned already."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
    return tensor if is_pinned(tensor) else mark_pinned(tensor.clone())
