"""Devices: chosen, checked and described here, so that no other module names one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor

from heterodiff.errors import ConfigError, reason, unknown_name

Device = str | torch.device
DType = str | torch.dtype
# Read once, at the first product on a GPU, which may be long before deterministic training.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

LONGEST_WAIT = timedelta(days=7)
"""Time to wait for a process that previews or writes; a process that dies ends the wait of the others at once."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """Return the accelerator of this machine (cuda, mps, xpu, ...), or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def find_device(device: Device | None = None) -> torch.device:
    """Return the device named ``device``; None means :func:`default_device`.

    Raises:
        ConfigError: no such device on this machine; the message lists those that exist.
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
    raise ConfigError(f"device '{device}': not on this machine, which has {known}; omit it for the best one")


def process_count() -> int:
    """Number of processes that were started together, as their launcher says, before any of them is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_state() -> Any:
    """Return accelerate's state of the processes of this run; each has the accelerator of its local rank."""
    from accelerate import PartialState

    state = PartialState(cpu=default_device().type == "cpu")  # explicit, else CPU processes do not find each other
    if state.num_processes == 1:
        state.device = default_device()
    return state


def _available() -> list[str]:
    accelerator = default_device()
    if accelerator.type == "cpu":
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]


def _module(device: torch.device) -> Any:
    """torch's module of a device type: ``torch.cuda``, ``torch.mps``, ..."""
    return getattr(torch, device.type, None)


def has_bfloat16(device: torch.device) -> bool:
    """Return True if ``device`` computes in bfloat16 without emulation."""
    if device.type in ("cpu", "mps"):
        return device.type == "cpu"
    supported = getattr(_module(device), "is_bf16_supported", None)
    return bool(supported(False)) if supported is not None else False  # False: emulation does not count


def find_dtype(dtype: DType | None, device: torch.device) -> torch.dtype:
    """Return the precision named ``dtype``; None means bfloat16 on CUDA where it is not emulated, else float32.

    Raises:
        ConfigError: an unknown precision; the message lists the known ones.
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
        count = torch.get_num_threads()
        return f"{count} CPU thread{'s' * (count != 1)}"
    name = getattr(_module(device), "get_device_name", None)
    return str(name(device)) if name is not None else device.type


def free_memory(device: torch.device) -> tuple[int, str]:
    """Return the free bytes on ``device``, and the name of that memory."""
    info = getattr(_module(device), "mem_get_info", None)
    if device.type == "cpu" or info is None:
        return psutil.virtual_memory().available, "memory"
    return int(info(device)[0]), "GPU memory"


def can_fuse_optimizer(device: torch.device) -> bool:
    """Return True if torch's fused optimisers can skip a step on ``device`` without a wait; mps ignores that flag."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    return device.type != "mps" and device.type in _get_fused_kernels_supported_devices()


def pins_memory(device: torch.device) -> bool:
    """Return True if copies from pinned host memory to ``device`` are asynchronous."""
    return device.type not in ("cpu", "mps") and _can_pin()


@cache
def _can_pin() -> bool:
    """Return True if the accelerator has an allocator of pinned memory; some outside torch have none."""
    try:
        torch.empty(1).pin_memory()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` to ``device``, if possible without waiting for its computations."""
    pins = pins_memory(device)  # an asynchronous copy from other memory could read what is written there next
    if pins and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=pins)


def double_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where ``device`` has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """If ``wanted``, use deterministic kernels, which are slower.

    Raises:
        ConfigError: a kernel has no deterministic form.
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
    """Allow kernels without a deterministic form inside :func:`deterministic_kernels`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def use_tf32(device: torch.device) -> None:
    """Let GPUs round the factors of float32 products to TensorFloat-32 (10 instead of 23 bits); sums stay float32.

    Training and every loaded pipeline call this, so that the thresholds of ``segment`` are learned and applied with the
    same rounding.
    """
    if device.type in ("cuda", "xpu"):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def synchronize(device: torch.device) -> None:
    """Wait for ``device`` to finish, for timing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
