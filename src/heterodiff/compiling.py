"""torch.compile of networks: where it pays, and in which way.

It costs minutes before the first step, and only a measurement on the device tells what it gains. Until one is committed
in ``measured.json``, nothing is compiled that nobody asked to.
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
    """What ``python -m benchmarks.gpu`` has measured, by the name of the device; empty where nobody has.

    ``compiling_pays_after_steps``: the length of a training run from which on compiling saves more than it costs, null
    where it saves nothing.
    """
    return json.loads(files("heterodiff").joinpath("measured.json").read_text("utf-8"))


def compiles(training: TrainingConfig) -> bool:
    """Whether a run compiles its network: as the configuration says, or where a measurement says that it pays."""
    if training.compile != "auto":
        return training.compile
    steps = measured().get(device_name(default_device()), {}).get("compiling_pays_after_steps")
    return steps is not None and training.steps >= steps


def compile_for_drawing(network: Any, way: Compile, device: torch.device) -> None:
    """Compile ``network`` in place, if ``way`` asks for it.

    Args:
        way: True, or ``graphs`` for CUDA graphs, which replay the kernels of a step without launching them one by one.

    Raises:
        ConfigError: an unknown way, or CUDA graphs elsewhere than on CUDA.
    """
    if way not in (True, False, "graphs"):
        raise ConfigError(f"compile={way!r}: expected True, False or 'graphs'")
    if way == "graphs" and device.type != "cuda":
        raise ConfigError(
            f"compile='graphs': CUDA graphs need CUDA, found {device.type}; take compile=True, or leave it"
        )
    if way:
        network.compile(dynamic=False, mode="reduce-overhead" if way == "graphs" else None)
