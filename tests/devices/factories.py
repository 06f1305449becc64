"""Tensors made on the test device out of nothing, and copies that torch makes beneath its dispatch to Python."""

from typing import Any

import torch

from tests.devices import memory
from tests.devices.counting import LAUNCH, record
from tests.devices.generators import check_generator, drawing_from_default
from tests.devices.tensor import DeviceTensor, copy

aten = torch.ops.aten

# Those that torch would make by resizing an empty tensor; all others fill a tensor of the right size.
FILLED = ("arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye", "eye.m", "tril_indices",
          "triu_indices", "scalar_tensor", "randperm", "randperm.generator")  # fmt: skip


def register_factories(library: torch.library.Library) -> None:
    library.impl("empty.memory_format", _making(aten.empty.memory_format), "PrivateUse1")
    library.impl("empty_strided", _making(aten.empty_strided.default), "PrivateUse1")
    for name in FILLED:
        base, _, overload = name.partition(".")
        func = getattr(getattr(aten, base), overload or "default")
        library.impl(name, _making(func, launches=True, draws=base == "randperm"), "PrivateUse1")
    for name in ("_copy_from", "_copy_from_and_resize"):
        library.impl(name, _copy_from, "PrivateUse1")


def _making(func: Any, launches: bool = False, draws: bool = False) -> Any:
    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> DeviceTensor:
        memory.allocate()
        if draws and kwargs.get("generator") is None:
            with drawing_from_default():
                out = func(*args, **kwargs)
        else:
            check_generator(kwargs.get("generator"), on_device=True)
            out = func(*args, **kwargs)
        if launches:
            record(LAUNCH, str(func))
        return DeviceTensor(out)

    return make


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return copy(aten._copy_from.default, target, source, non_blocking)
