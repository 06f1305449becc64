"""torch.compile of networks: on which devices, and in which mode.

Compiling takes minutes before the first step, and only a measurement on the device tells what it gains. Devices without
one in ``measured.json`` compile on request only.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch

from heterodiff.config import TrainingConfig
from heterodiff.devices import default_device, device_name
from heterodiff.errors import ConfigError

Compile = bool | Literal["graphs"]


@cache
def measured() -> dict[str, dict[str, Any]]:
    """Read the measurements of ``python -m benchmarks.gpu``, by the name of the device.

    ``compiling_pays_after_steps`` is the number of training steps from which compiling saves time; null for never.
    """
    return json.loads(files("heterodiff").joinpath("measured.json").read_text("utf-8"))


def compiles(training: TrainingConfig) -> bool:
    """Decide if a run compiles its network: by the configuration, or by a measurement of the device."""
    if training.compile != "auto":
        return training.compile
    steps = measured().get(device_name(default_device()), {}).get("compiling_pays_after_steps")
    return steps is not None and training.steps >= steps


def compile_for_drawing(network: Any, way: Compile, device: torch.device) -> None:
    """Compile ``network`` in place, unless ``way`` is False.

    Args:
        way: True, or ``graphs`` for CUDA graphs, which replay the kernels of a step without launching them one by one.

    Raises:
        ConfigError: another ``way``, or CUDA graphs on another device than CUDA.
    """
    if way not in (True, False, "graphs"):
        raise ConfigError(f"compile={way!r}: expected True, False or 'graphs'")
    if way == "graphs" and device.type != "cuda":
        raise ConfigError(f"compile='graphs': CUDA graphs need CUDA, found {device.type}; use compile=True, or omit it")
    if way:
        network.compile(dynamic=False, mode="reduce-overhead" if way == "graphs" else None)
