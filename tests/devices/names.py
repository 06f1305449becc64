"""Name of the test device, and how its tensors are told from others."""

from typing import Any

import torch

NAME = "twin"  # torch.device("twin:0")


def is_on_device(value: Any) -> bool:
    """Whether ``value`` is a tensor on the test device."""
    return isinstance(value, torch.Tensor) and value.device.type == NAME
