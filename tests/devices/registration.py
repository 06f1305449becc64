"""Makes the test device known to torch. This cannot be undone, so it needs a process of its own."""

import torch
from torch.optim import optimizer
from torch.utils import _foreach_utils, backend_registration

from tests.devices import attention, autocast, factories, generators, pinned
from tests.devices.module import DeviceModule
from tests.devices.names import NAME
from tests.devices.tensor import DeviceTensor

_libraries: list[torch.library.Library] = []  # what they register lasts as long as they do


def register() -> None:
    """Register the device; from now on it is the accelerator of this process."""
    if _libraries:
        return
    module = DeviceModule()
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    _libraries.append(aten)
    factories.register_factories(aten)
    autocast.teach_autocast(aten)
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        aten.impl("scaled_dot_product_attention", attention.attention, key)
    generators.refuse_on_cpu()
    torch.Tensor.pin_memory = pinned.pin_memory  # type: ignore[method-assign, assignment]
    torch.Tensor.is_pinned = pinned.is_pinned  # type: ignore[method-assign, assignment]
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps its parameters, as on CUDA
    for types in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
        types.append(DeviceTensor)
    _teach_accelerator(module)


def _teach_accelerator(module: DeviceModule) -> None:
    """The functions of torch.accelerator that a device in Python cannot serve otherwise."""
    names = (
        "synchronize", "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved",
        "memory_stats", "reset_peak_memory_stats", "empty_cache",
    )  # fmt: skip
    for name in names:
        setattr(torch.accelerator, name, getattr(module, name))
    torch.accelerator.get_memory_info = module.mem_get_info
