"""Every recipe and codec trains on another device as on the CPU, in every precision, and goes on when stopped."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from heterodiff.pipelines.load import load
from tests.devices import NAME
from tests.devices.runs import RECIPES, rows, tensors, train, train_on_cpu

SCALER = torch.amp.GradScaler


@pytest.fixture(params=RECIPES)
def trained(request: pytest.FixtureRequest, runs: Callable[[str], Path]) -> tuple[str, Path]:
    """A recipe, and a folder with its ``run`` of two steps on the device and its ``codecs``."""
    return request.param, runs(request.param).parent


def test_two_steps_are_those_of_the_cpu(trained: tuple[str, Path], tmp_path: Path) -> None:
    recipe, folder = trained
    device, cpu = folder / "run", tmp_path / "run"
    train_on_cpu(RECIPES[recipe](cpu, folder / "codecs"))
    for row, expected in zip(rows(device), rows(cpu), strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-5)
    here, there = (torch.cat([v.flatten() for v in weights_of(run)]) for run in (device, cpu))
    # AdamW's first steps are the gradient's sign: where it is rounding alone, weights part.
    assert ((here - there).abs() > 1e-4).float().mean() < 0.02
    (picture,) = (device / "samples").iterdir()
    assert_alike(picture, cpu / "samples" / picture.name)
    assert load(device).device.type == NAME


def weights_of(run: Path) -> list[torch.Tensor]:
    return [value for name, value in tensors(run).items() if name.startswith("ema/")]


def assert_alike(first: Path, second: Path) -> None:
    """Two pictures differ by rounding."""
    with Image.open(first) as one, Image.open(second) as other:
        difference = np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int))
    assert difference.mean() < 0.5, first.name


def test_a_run_that_was_stopped_goes_on_bit_by_bit(trained: tuple[str, Path], tmp_path: Path) -> None:
    recipe, folder = trained
    config = RECIPES[recipe](tmp_path / "run", folder / "codecs")
    train(config, stop_after=1)
    train(config)
    assert rows(tmp_path / "run")[-1] == rows(folder / "run")[-1]
    here, there = tensors(folder / "run"), tensors(tmp_path / "run")
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def test_deterministic_kernels_serve_every_recipe(trained: tuple[str, Path], tmp_path: Path) -> None:
    recipe, folder = trained
    config = RECIPES[recipe](tmp_path / "run", folder / "codecs", training__deterministic=True)
    train(config)
    assert rows(tmp_path / "run")[-1].keys() == rows(folder / "run")[-1].keys()


def test_bfloat16_gives_nearly_the_losses_of_float32(trained: tuple[str, Path], tmp_path: Path) -> None:
    recipe, folder = trained
    train(RECIPES[recipe](tmp_path / "run", folder / "codecs", training__precision="bfloat16"))
    found, expected = ([row for row in rows(path / "run") if "loss" in row][-1] for path in (tmp_path, folder))
    assert found.keys() == expected.keys()
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert found["loss"] != expected["loss"]


def scaler(device: str, **options: bool) -> torch.amp.GradScaler:
    """A scaler under which the first step overflows and the second does not."""
    return SCALER(device, init_scale=2.0**60, backoff_factor=2.0**-54, **options)


def test_float16_leaves_out_the_step_that_overflows_and_goes_on(trained: tuple[str, Path], tmp_path: Path) -> None:
    recipe, folder = trained
    config = RECIPES[recipe](tmp_path / "run", folder / "codecs", training__precision="float16")
    with mock.patch.object(torch.amp, "GradScaler", scaler):
        train(config, stop_after=1)
        first = tensors(tmp_path / "run")
        train(config)
    last = tensors(tmp_path / "run")
    second = next(row for row in rows(tmp_path / "run") if row["step"] == 2 and "loss" in row)
    assert np.isfinite([second["loss"], second["grad_norm"]]).all()
    assert all(bool(value.isfinite().all()) for value in last.values())
    trained_weights = [name for name in first if name.startswith("model/") and first[name].is_floating_point()]
    assert any(not torch.equal(first[name], last[name]) for name in trained_weights)
    moments = [name for name in first if name.startswith("optimizer/") and name.endswith("exp_avg_sq")]
    assert not any(first[name].any() for name in moments)
    assert any(last[name].any() for name in last if name.endswith("exp_avg_sq"))
