"""When networks are compiled, and in which way."""

import json
from importlib.resources import files

import pytest
import torch
from torch import nn

from heterodiff import compiling
from heterodiff.config import TrainingConfig
from heterodiff.devices import default_device, device_name
from heterodiff.errors import ConfigError


def test_nothing_is_compiled_that_nobody_has_measured() -> None:
    content = json.loads(files("heterodiff").joinpath("measured.json").read_text("utf-8"))
    assert content == compiling.measured()
    assert device_name(default_device()) not in content
    assert not compiling.compiles(TrainingConfig(steps=10**9))


@pytest.mark.parametrize(("pays", "steps", "expected"), [(500, 499, False), (500, 500, True), (None, 10**9, False)])
def test_auto_follows_the_measurement(
    pays: int | None, steps: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {device_name(default_device()): {"compiling_pays_after_steps": pays}}
    monkeypatch.setattr(compiling, "measured", lambda: row)
    assert compiling.compiles(TrainingConfig(steps=steps)) is expected
    assert compiling.compiles(TrainingConfig(steps=steps, compile=True))
    assert not compiling.compiles(TrainingConfig(steps=steps, compile=False))


def test_graphs_need_cuda_and_other_ways_are_unknown() -> None:
    with pytest.raises(ConfigError, match="CUDA graphs need CUDA, found cpu"):
        compiling.compile_for_drawing(nn.Linear(1, 1), "graphs", torch.device("cpu"))
    with pytest.raises(ConfigError, match="expected True, False or 'graphs'"):
        compiling.compile_for_drawing(nn.Linear(1, 1), "graph", torch.device("cpu"))  # type: ignore[arg-type]


def test_ways_reach_the_compiler() -> None:
    class Network:
        def compile(self, **options: object) -> None:
            self.options = options

    for way, device, mode in ((True, "cpu", None), (True, "cuda", None), ("graphs", "cuda", "reduce-overhead")):
        network = Network()
        compiling.compile_for_drawing(network, way, torch.device(device))
        assert network.options == {"dynamic": False, "mode": mode}
    compiling.compile_for_drawing(None, False, torch.device("cpu"))
