"""Where networks compute: every device is chosen, checked and described here, so that no other module names one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor

from heterodiff.errors import ConfigError, reason, unknown_name

Device = str | torch.device
DType = str | torch.dtype
# cuBLAS and torch read this once, at the first product on a GPU, which may be long before deterministic training.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """Return the accelerator of this machine (cuda, mps, xpu, ...), or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def find_device(device: Device | None = None) -> torch.device:
    """Return the device called ``device``; None means :func:`default_device`.

    Raises:
        ConfigError: no such device on this machine; the devices that are there are named.
    """
    if device is None:
        return default_device()
    known = ", ".join(_available())
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device '{device}': not the name of a device; this machine has {known}") from None
    if found.type == "cpu" or f"{found.type}:{found.index or 0}" in _available():
        return found
    raise ConfigError(f"device '{device}': not on this machine, which has {known}; leave it out for the best")


def process_state() -> Any:
    """Return accelerate's view of the processes of this run, each with a device of its own.

    Several processes, as torchrun starts them, share the accelerators of a machine by their local rank.
    """
    from accelerate import PartialState

    state = PartialState(cpu=default_device().type == "cpu")  # said aloud, else CPU processes do not find each other
    if state.num_processes == 1:
        state.device = default_device()
    return state


def _available() -> list[str]:
    accelerator = default_device()
    if accelerator.type == "cpu":
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]


def _module(device: torch.device) -> Any:
    """torch's module for a kind of device: ``torch.cuda``, ``torch.mps``, ..."""
    return getattr(torch, device.type, None)


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 without emulating it."""
    if device.type in ("cpu", "mps"):
        return device.type == "cpu"
    supported = getattr(_module(device), "is_bf16_supported", None)
    return bool(supported(False)) if supported is not None else False  # False: emulation does not count


def find_dtype(dtype: DType | None, device: torch.device) -> torch.dtype:
    """Return the precision called ``dtype``; None means the best for drawing images on ``device``.

    That is bfloat16 on CUDA where it is not emulated, else float32.

    Raises:
        ConfigError: an unknown precision; the known ones are named.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16(device) else torch.float32
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype)
    if name not in DTYPES:
        raise ConfigError(unknown_name("dtype", name, DTYPES))
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Name a precision, as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Describe ``device`` for the records of a run, as ``NVIDIA H200`` or ``2 CPU threads``."""
    if device.type == "cpu":
        return f"{torch.get_num_threads()} CPU threads"
    name = getattr(_module(device), "get_device_name", None)
    return str(name(device)) if name is not None else device.type


def free_memory(device: torch.device) -> tuple[int, str]:
    """Return the bytes that are free on ``device``, and what memory that is."""
    info = getattr(_module(device), "mem_get_info", None)
    if device.type == "cpu" or info is None:
        return psutil.virtual_memory().available, "memory"
    return int(info(device)[0]), "GPU memory"


def can_fuse_optimizer(device: torch.device) -> bool:
    """Whether torch's optimisers have a fused form on ``device`` that can leave a step out without a wait.

    That of mps takes the flag, but does not look at it.
    """
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    return device.type != "mps" and device.type in _get_fused_kernels_supported_devices()


def pins_memory(device: torch.device) -> bool:
    """Whether ``device`` has memory of its own, to which copies from pinned host memory run beside other work."""
    return device.type not in ("cpu", "mps") and _can_pin()


@cache
def _can_pin() -> bool:
    """Whether the accelerator brings an allocator of pinned memory, which some that come from outside torch lack."""
    try:
        torch.empty(1).pin_memory()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` to ``device``, where it can without waiting for what is computed there."""
    pins = pins_memory(device)  # a copy that is not waited for may read memory that is used anew, unless it is pinned
    if pins and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=pins)


def double_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where ``device`` has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Let every kernel give the same bits for the same input, at some cost of speed, if ``wanted``.

    Raises:
        ConfigError: one of them cannot.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    switches.fill_uninitialized_memory = False  # a search for bugs, not for equal bits
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(f"training.deterministic=true: {reason(error)}; set it to false") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        switches.fill_uninitialized_memory = filled


@contextmanager
def any_kernels() -> Iterator[None]:
    """Inside :func:`deterministic_kernels`, let also kernels work that have no such form."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def use_tf32(device: torch.device) -> None:
    """Let GPUs round the factors of float32 products to TensorFloat-32, ten bits of fraction in place of 23.

    Sums stay float32. Nothing changes on other devices. Training and every loaded pipeline call this, so that the
    thresholds of ``segment`` are learned and applied with the same rounding.
    """
    if device.type in ("cuda", "xpu"):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
