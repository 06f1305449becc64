"""Golden files of tests/data: weights that are made from their names, and numbers that stand for large tensors.

A network with norms of 32 groups has 10^5 weights and a run keeps eight of each, too much for a repository. Weights are
therefore not stored: a tensor's values are the SHAKE-128 sum of its name, alike on all machines to the last bit.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from heterodiff.config import RunConfig
from tests.training_runs import last_checkpoint, losses_of

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


def cut(path: Path) -> None:
    """Leave of a safetensors file its header alone, under its name and ``.header``."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.with_name(path.name + HEADER).write_bytes(content[: 8 + length])
    path.unlink()


def fill(header: Path) -> None:
    """Make a safetensors file of its header, with values made from the names; the reverse of :func:`cut`."""
    content = header.read_bytes()
    entries = {name: entry for name, entry in json.loads(content[8:]).items() if name != "__metadata__"}
    path = header.with_name(header.name.removesuffix(HEADER))
    with path.open("wb") as file:
        file.write(content)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            assert entry["dtype"] == "F32", f"{path}: {name}"
            file.write(_value(path, name, entry["shape"]).numpy().astype("<f4").tobytes())
    header.unlink()


def _value(path: Path, name: str, shape: list[int]) -> Tensor:
    """A value of a checkpoint or a network. Saved networks are averages, as ``ema.safetensors`` is."""
    if path.stem != "optimizer":
        return weight(name, shape, of="model" if path.stem == "model" else "ema")
    name, _, slot = name.rpartition("/")
    if slot == "step":
        return torch.tensor(float(path.parent.name.removeprefix("step_")))
    values = uniform(f"{slot}/{name}", shape)
    return values / 2**10 if slot == "exp_avg" else (values + 2) / 2**20


def unpack(name: str, folder: Path) -> Path:
    """A copy of the run ``name`` of tests/data/runs in ``folder``, with all of its files whole."""
    run = Path(shutil.copytree(RUNS / name, folder))
    for header in sorted(run.rglob(f"*{HEADER}")):
        fill(header)
    return run


def moved(config: RunConfig, folder: Path) -> RunConfig:
    """``config`` of a run that now lies in ``folder``."""
    codec = config.codec
    if codec.kind == "cnn":
        codec = codec.model_copy(update={"path": folder / "alignment"})
    return config.model_copy(update={"output": folder, "codec": codec})


def outcome(before: Path, after: Path) -> dict[str, Tensor]:
    """What a run did between two states of its folder, both with a checkpoint.

    Returns:
        ``losses``: (step, loss, gradient norm) of each step; ``model`` and ``ema``: the :func:`summary` of the change
        of each trained and each averaged weight, sorted by name.
    """
    step, old, _ = last_checkpoint(before)
    _, new, _ = last_checkpoint(after)
    found = {"losses": torch.tensor([row for row in losses_of(after) if row[0] > step])}
    for group in ("model", "ema"):
        names = sorted(name for name in old if name.startswith(f"{group}/"))
        found[group] = torch.stack([summary(name, new[name] - old[name]) for name in names])
    return found
