"""Where networks compute: every device is chosen, checked and described here, so that no other module names one."""

from typing import Any

import psutil
import torch

from heterodiff.errors import ConfigError

Device = str | torch.device


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
    return bool(supported()) if supported is not None else False


def device_name(device: torch.device) -> str:
    """Describe ``device`` for the records of a run, as ``NVIDIA H200`` or ``2 CPU threads``."""
    if device.type == "cpu":
        return f"{torch.get_num_threads()} CPU threads"
    name = getattr(_module(device), "get_device_name", None)
    return str(name()) if name is not None else device.type


def free_memory(device: torch.device) -> tuple[int, str]:
    """Return the bytes that are free on ``device``, and what memory that is."""
    info = getattr(_module(device), "mem_get_info", None)
    if device.type == "cpu" or info is None:
        return psutil.virtual_memory().available, "memory"
    return int(info()[0]), "GPU memory"


def double_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where ``device`` has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def use_deterministic_kernels() -> None:
    """Let every kernel give the same bits for the same input, at some cost of speed."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


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
