"""The number type that networks compute in, and the loss scaling that float16 needs."""

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from heterodiff.config import TrainingConfig
from heterodiff.devices import default_device, has_bfloat16
from heterodiff.errors import ConfigError

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def precision_of(config: TrainingConfig) -> torch.dtype | None:
    """Return the type that networks compute in under autocast; None for float32.

    Raises:
        ConfigError: float16 without a GPU.
    """
    wanted, device = config.precision, default_device()
    if wanted == "float16" and device.type == "cpu":
        raise ConfigError("training.precision=float16 needs a GPU, found none; use float32 or bfloat16")
    if wanted == "auto":
        wanted = "bfloat16" if device.type != "cpu" and has_bfloat16(device) else "float32"
    return DTYPES[wanted]


def compute_in(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Let ``module`` compute in ``dtype`` under autocast from now on, and return float32; None changes nothing."""
    if dtype is not None:
        autocast = torch.autocast(device.type, dtype=dtype)
        module.forward = convert_outputs_to_fp32(autocast(module.forward))


def loss_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Return the scaler that keeps small gradients of float16 above zero; it does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
