"""The estimate of runs on several devices."""

from pathlib import Path

import pytest
import torch

from heterodiff.config.file import dump_config
from heterodiff.training.build import build_recipe, load_run_data
from heterodiff.training.preflight.scaling import Scaling, exchanged_bytes, scaled, write_rate
from tests.test_cli import call
from tests.training_runs import tiny_config

SMALL = {"model__variant": "unet-conv", "model__channel_mult": [1]}


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_bytes_of_a_ring(devices: int) -> None:
    """Counted part by part: a device sends a part of 1 / n in each of 2 (n - 1) rounds."""
    parts = [len(part) for part in torch.arange(9_240).tensor_split(devices)]
    rounds = 2 * (devices - 1)
    sent = sum(4 * parts[(0 - k) % devices] for k in range(rounds))
    assert exchanged_bytes(9_240, devices) == pytest.approx(sent, rel=1e-3)


def test_a_step_is_between_hidden_and_visible_exchange() -> None:
    assert Scaling(4, 8, 0.3, 10, 0.1).step_seconds == (0.3, pytest.approx(0.4))
    assert Scaling(4, 8, 0.1, 10, 0.3).step_seconds == (0.3, pytest.approx(0.4))


def test_two_devices_compute_half_of_the_batch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", **SMALL, training__batch_size=32)
    data = load_run_data(config)
    parameters = sum(p.numel() for p in build_recipe(config, data).model.parameters())
    slow, fast = (scaled(config, data, parameters, 2, link) for link in (1e-3, 1e3))
    assert slow.images == 16
    assert slow.exchanged_bytes == 4 * parameters
    assert slow.exchange_seconds == pytest.approx(1e6 * fast.exchange_seconds)
    assert not (tmp_path / "run").exists()


def test_nothing_stays_of_what_times_the_disk(tmp_path: Path) -> None:
    assert write_rate(tmp_path / "not" / "there" / "yet") > 0
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config(tmp_path / "run", **SMALL)))
    assert call("check", config, "--gpus", "4", "--link", "200") == 0
    shown = capsys.readouterr().out
    for name in (
        "devices    4 with 2 images each",
        "exchange",
        "at 200 GB a second",
        "reading    8 images",
        "checkpoint",
    ):
        assert name in shown
    assert call("check", config, "--gpus", "3") == 1
    assert "does not split into 3 process(es)" in capsys.readouterr().err
    assert call("check", tmp_path / "none.yaml", "--gpus", "2") == 1
    assert "no such configuration file" in capsys.readouterr().err
    assert call("check", tmp_path, "--gpus", "2") == 1
    assert "estimates the run of a configuration file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
