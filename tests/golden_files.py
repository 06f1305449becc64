"""Golden files of tests/data: weights that are made from their names, and numbers that stand for large tensors.

A network with norms of 32 groups has 10^5 weights and a run keeps eight of each, too much for a repository. Weights are
therefore not stored: a tensor's values are the SHAKE-128 sum of its name, alike on all machines to the last bit.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"
RUNS = DATA / "runs"
HEADER = ".header"
"""Suffix of a safetensors file of which only the header is stored: names, shapes and metadata."""


def uniform(name: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Values in [-1, 1) that depend on nothing but ``name``; float32, exactly representable."""
    count = math.prod(shape)
    digits = np.frombuffer(hashlib.shake_128(name.encode()).digest(2 * count), "<i2")
    return torch.from_numpy(digits.astype(np.float32) / 32768).reshape(tuple(shape))


def weight(name: str, shape: tuple[int, ...] | list[int], of: str = "weights") -> Tensor:
    """A weight as of a trained network: norms about 1, small biases, all others of variance about 1 / fan-in.

    Args:
        of: whose weight it is; others have other values.
    """
    values = uniform(f"{of}/{name}", shape)
    if len(shape) < 2:
        return 1 + values / 4 if name.endswith("weight") else values / 8
    fan_in = math.prod(shape[1:])
    return values * 2.0 ** round(math.log2(math.sqrt(3 / fan_in)))  # times a power of two: exact


def summary(name: str, tensor: Tensor) -> Tensor:
    """Two numbers that stand for ``tensor``: its norm, and the mean product with values made from its name."""
    tensor = tensor.detach().double()
    return torch.stack([tensor.norm(), (tensor * uniform(f"probe/{name}", tensor.shape)).sum() / tensor.numel() ** 0.5])


def read_golden(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a golden file; each value of the metadata is JSON."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, {key: json.loads(text) for key, text in file.metadata().items()}
