"""Every shipped configuration trains and draws, shortened to a step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import heterodiff as hd
from heterodiff.cli import shipped_configs
from heterodiff.config_file import load_config
from heterodiff.training.start import train

SHIPPED = sorted(shipped_configs().glob("*.yaml"))
FEWER = {"microdoppler": ["data.microdoppler.images_per_class=3"], "images": [], "digits": []}


def _pictures(folder: Path, side: int) -> Path:
    """Three grey pictures in each of two class folders."""
    rng = np.random.default_rng(0)
    for k in range(6):
        path = folder / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_trains_and_draws(path: Path, tmp_path: Path) -> None:
    shipped = load_config(path)
    overrides = [f"output={tmp_path / 'run'}", "training.steps=1", "training.batch_size=2", "training.warmup_steps=1"]
    overrides += FEWER[shipped.data.source]
    if shipped.codec.training is not None:
        overrides += [f"codec.path={tmp_path / 'vae'}", "codec.training.steps=1", "codec.training.batch_size=2"]
    if shipped.data.source == "images":
        assert shipped.data.image_size is not None
        overrides += [f"data.path={_pictures(tmp_path / 'data', shipped.data.image_size[0])}"]
    config = load_config(path, overrides)
    assert train(config, quiet=True).step == 1
    pipeline = hd.load(tmp_path / "run")
    assert isinstance(pipeline, hd.GenerationPipeline)
    images = pipeline(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    size = config.data.image_size or (8, 8)
    assert tuple(images.shape) == (1, 1, *size)
    assert bool(((images >= 0) & (images <= 1)).all())
