"""Settings for all tests."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may reach for the network

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread a test process: two fighting over the same cores are far slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets, which the project does not ship."""
    folder = Path(os.environ.get("HETERODIFF_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets not found in {folder} (set HETERODIFF_DATA)")
    return folder
