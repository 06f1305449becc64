"""Memory of the test device: what its tensors take, and an allocation that fails when a test asks for it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TOTAL = 8 * 2**30  # bytes

_until_failure: list[int] = []


def allocated() -> int:
    """Bytes that the tensors of the device take now; those that share memory are counted once."""
    from tests.devices.tensor import DeviceTensor

    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) is DeviceTensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def out_of_memory(after: int) -> Iterator[None]:
    """Let the device run out of memory in this block, once, after that many operations."""
    _until_failure.append(after)
    try:
        yield
    finally:
        _until_failure.clear()


def allocate() -> None:
    """Called by each operation before it computes.

    Raises:
        torch.OutOfMemoryError: a test asked for it.
    """
    if _until_failure:
        _until_failure[0] -= 1
        if _until_failure[0] < 0:
            _until_failure.clear()
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB.")
