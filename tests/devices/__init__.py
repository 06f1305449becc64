"""A test device: a second device on any machine, to test what only an accelerator would show.

``twin:0`` computes on the CPU, with the CPU's random numbers, so that results can be compared. It refuses what CUDA
refuses: tensors of two devices in one operation, generators of another device, ``.numpy()``. It counts kernel
launches, copies to the device and waits for it, by line of heterodiff.

    from tests.devices import register, watched

    register()  # the accelerator of this process from now on; cannot be undone
    with watched() as counts:
        ...
    print(counts.report())

    python -m tests.devices train digits training.steps=3 output=DIR  # any command line of heterodiff on the device

Not modelled: time, several devices, streams, kernels' preferred memory layouts, nondeterminism.

Tensors are wrappers of CPU tensors on the PrivateUse1 device (torch >= 2.12), whose ``__torch_dispatch__`` unwraps,
checks, computes, counts and wraps. Tests of the device lie beside it and run by ``pytest tests/devices`` alone: a
process that has registered it can no longer test the CPU as default.
"""

from tests.devices.counting import Counts, watched
from tests.devices.names import NAME

__all__ = ["NAME", "Counts", "register", "watched"]


def register() -> None:
    """Register the device in this process; see :mod:`tests.devices.registration`."""
    from tests.devices.registration import register as make_known

    make_known()
