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
def digits_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of recipe `vae` that reconstructs 16x16 digits with 17 dB; to be left as it is."""
    from heterodiff.training.start import train
    from tests.vae_runs import vae_config

    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("digits") / "vae"
    options = {"steps": 80, "batch_size": 16, "learning_rate": 1e-2, "preview_every": 40}
    train(vae_config(run, **{f"training__{key}": value for key, value in options.items()}), quiet=True)
    return run


@pytest.fixture(scope="session")
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of recipe `text-image` on 16x16 shapes that knows its texts apart; to be left as it is."""
    from heterodiff.training.start import train
    from tests.text_runs import QUIET, TRAINING, text_config

    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("shapes") / "run"
    learning = {"batch_size": 16, "learning_rate": 3e-3, "ema_decay": 0.8, "preview_every": 20}
    options = {f"training__{key}": value for key, value in ({"steps": 40} | learning).items()}
    codec = {"codec__training": {**TRAINING, **QUIET, **learning, "steps": 60}, "codec__path": str(run / "alignment")}
    train(text_config(run, alignment__contrastive_weight=5.0, **codec, **options), quiet=True)
    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets, which the project does not ship."""
    folder = Path(os.environ.get("HETERODIFF_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets not found in {folder} (set HETERODIFF_DATA)")
    return folder
