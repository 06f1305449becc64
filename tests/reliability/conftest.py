"""A finished run to be damaged."""

from pathlib import Path

import pytest
import torch

from heterodiff.training.start import train
from tests.training_runs import tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; a test that damages it in its place puts it back."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(folder, training__steps=2, training__warmup_steps=1), quiet=True)
    return folder
