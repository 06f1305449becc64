"""The module ``torch.twin``, as ``torch.cuda`` is CUDA's: what torch and heterodiff ask a device for."""

from typing import Any

import torch

from tests.devices import generators, memory
from tests.devices.counting import WAIT, record


class DeviceModule:
    """One device with 8 GiB of memory that knows bfloat16 and float16."""

    _initialized = True

    class device:
        """``with torch.twin.device(0):``; there is one device, so nothing changes."""

        def __init__(self, device: Any = None) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def get_device_name(self, device: Any = None) -> str:
        return "test device"

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = None) -> None:
        record(WAIT, "synchronize")

    def empty_cache(self) -> None:
        pass

    # ---- random numbers

    def manual_seed(self, seed: int) -> None:
        generators.default.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return generators.default.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        generators.default.set_state(state)

    # ---- memory

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return memory.TOTAL - memory.allocated(), memory.TOTAL

    def memory_allocated(self, device: Any = None) -> int:
        return memory.allocated()

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {"allocated_bytes.all.current": memory.allocated()}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass
