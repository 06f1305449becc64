"""Between two log lines a training step waits for the device not once; nor does a denoising step."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.launches import SHORT, count_sampling, count_training
from heterodiff.config.file import load_config
from heterodiff.diffusion.samplers import list_samplers
from tests.conftest import ROOT
from tests.devices.runs import RECIPES

STEPS = {f"training__{key}": value for key, value in (SHORT | {"log_every": 100, "checkpoint_every": 100}).items()}
WAITING = ("unipc",)  # diffusers solves a small system of equations on the device, which is checked at each step
COPIES = {"pixels": 2, "alignment": 3}
BLOCKING = {"vae": 1}  # torchmetrics sends the size of its window for the SSIM of images below 12x12


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_step_does_not_wait(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = count_training(RECIPES[recipe](run, tmp_path / "codecs", **STEPS), run)
    assert found["launches"] > 50
    assert (found["waits"], found["blocking_copies"]) == (0, BLOCKING.get(recipe, 0))
    assert found["copies"] <= COPIES.get(recipe, 4)


def test_a_step_on_the_digits_launches_few_kernels(tmp_path: Path) -> None:
    overrides = [f"training.{key}={str(value).lower()}" for key, value in SHORT.items()]
    config = load_config(ROOT / "configs" / "digits.yaml", overrides)
    found = count_training(config, tmp_path / "run")
    assert 100 < found["launches"] <= 1000
    assert (found["waits"], found["copies"] <= 2) == (0, True)


def test_a_denoising_step_does_not_wait(runs: Callable[[str], Path]) -> None:
    for sampler in list_samplers():
        found = count_sampling(runs("pixels"), sampler)
        assert found["launches"] > 100
        assert found["waits"] == (sampler in WAITING), sampler
        assert (found["blocking_copies"] > 0) == (sampler in WAITING), sampler
