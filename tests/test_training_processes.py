"""Settings of processes and devices that are refused before work starts."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from heterodiff import devices
from heterodiff.config import TrainingConfig
from heterodiff.config.file import parse_config
from heterodiff.errors import ConfigError
from heterodiff.training.optimization import check_training, step_unless
from heterodiff.training.precision import precision_of
from heterodiff.training.processes import REFUSED, HostGroup, make_accelerator


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.value)
def test_networks_split_over_processes_are_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ConfigError, match="torchrun"):
        make_accelerator()


def test_weights_that_are_split_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"training\.fsdp=true does not go with training\.compile=true"):
        check_training(TrainingConfig(fsdp=True, compile=True))
    check_training(TrainingConfig(fsdp=True))
    vae = {"kind": "kl-vae", "path": "vae", "training": {"fsdp": True}}
    with pytest.raises(ConfigError, match=r"codec\.training\.fsdp=true: only the denoiser"):
        parse_config({"codec": vae})


def test_one_process_agrees_with_itself() -> None:
    group = HostGroup(make_accelerator())
    group.wait()
    assert group.first_signal(None) is None
    assert group.first_signal(15) == 15


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        precision_of(TrainingConfig(precision="float16"))
    assert precision_of(TrainingConfig(precision="auto")) is None
    assert precision_of(TrainingConfig(precision="bfloat16")) == torch.bfloat16


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_left_out_changes_neither_weights_nor_moments(fused: bool) -> None:
    """With the fused optimiser, which looks at the flag itself, and with one that cannot."""
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
    for left_out in (False, True):
        before = [parameter.detach().clone() for parameter in network.parameters()]
        moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
        steps = [float(state["step"]) for state in optimizer.state.values()]
        network(torch.full((1, 2), torch.nan if left_out else 1.0)).sum().backward()
        step_unless(optimizer, torch.tensor(left_out))
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
        assert all(same) if left_out else not any(same)
    assert all(torch.equal(a, state["exp_avg"]) for a, state in zip(moments, optimizer.state.values(), strict=True))
    assert steps == [float(state["step"]) for state in optimizer.state.values()] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "xpu:0", "no device", "cpu:x"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=r"machine,? (which )?has cpu"):
        devices.find_device(name)


def test_device_by_name() -> None:
    assert devices.find_device() == devices.default_device() == torch.device("cpu")
    assert devices.find_device("cpu") == devices.find_device(torch.device("cpu")) == torch.device("cpu")
    assert devices.free_memory(torch.device("cpu"))[0] > 1e6
    assert "CPU thread" in devices.device_name(torch.device("cpu"))


@pytest.mark.parametrize("emulates", [True, False])
def test_bfloat16_that_a_gpu_only_emulates_does_not_count(emulates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:  # as torch.cuda's, on GPUs before Ampere and after
        return including_emulation or not emulates

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.has_bfloat16(torch.device("cuda")) == (not emulates)


def test_a_device_is_asked_about_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (device.index, 0) if device else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"number {device.index}")
    second = torch.device("cuda:1")
    assert devices.free_memory(second) == (1, "GPU memory")
    assert devices.device_name(second) == "number 1"


def test_the_fused_optimiser_of_mps_does_not_look_at_the_flag() -> None:
    assert devices.can_fuse_optimizer(torch.device("cpu"))
    assert devices.can_fuse_optimizer(torch.device("cuda"))
    assert not devices.can_fuse_optimizer(torch.device("mps"))


def test_deterministic_kernels_for_a_while() -> None:
    with devices.deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with devices.deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_that_cannot_be_deterministic_names_the_setting() -> None:
    refused = pytest.raises(ConfigError, match=r"training\.deterministic=true: put_ .*set it to false")
    with refused, devices.deterministic_kernels(True):
        torch.ones(2).put_(torch.tensor([0]), torch.ones(1))
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_is_set_up_before_anything_is_computed() -> None:
    """Not only when deterministic training begins: torch looks once, at the first product on a GPU."""
    look = "import os, heterodiff.devices; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    found = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ":4096:8"
