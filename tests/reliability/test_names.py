"""Classes whose names files and terminals cannot hold: nothing is overwritten, mixed up, or sent to the terminal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_cli import call

CLASSES = ("a b", "a?b", "a_b", "plain", "x\x1b[31mred")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    for number, name in enumerate(CLASSES):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for image in range(3):
            pixels = np.random.default_rng(number + 10 * image).integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    (tmp_path / "config.yaml").write_text(
        f"data: {{source: images, path: '{tmp_path / 'data'}'}}\n"
        "model: {variant: unet-conv, model_channels: 32, channel_mult: [1], layers_per_block: 1}\n"
        "training: {steps: 1, batch_size: 2, warmup_steps: 1, tensorboard: false}\n"
        f"sampling: {{num_inference_steps: 2}}\noutput: '{tmp_path / 'run'}'\n"
    )
    return tmp_path / "config.yaml"


def test_names_of_classes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", config) == 0
    assert call("train", config) == 0
    assert call("sample", tmp_path / "run", "-n", "1", "--out", tmp_path / "out") == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*_0000.png"))
    classes = sorted(CLASSES)
    same = [f"a_b-class{classes.index(name)}_0000.png" for name in ("a b", "a?b", "a_b")]
    assert files == sorted([*same, "plain_0000.png", "x_31mred_0000.png"])
    assert call("sample", tmp_path / "run", "--class", "none such", "--out", tmp_path / "no") == 1
    shown = capsys.readouterr()
    assert "x\\x1b[31mred" in shown.out
    assert "x\\x1b[31mred" in shown.err
    assert "\x1b" not in shown.out + shown.err
