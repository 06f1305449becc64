"""Classes whose names files and terminals cannot hold: nothing is overwritten, mixed up, or sent to the terminal."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heterodiff.run_folder import RunFolder
from tests.test_cli import call

CLASSES = ("a b", "a?b", "a_b", "plain", "x\x1b[31mred")
LATIN = os.fsdecode(b"caf\xe9")
"""A name in Latin-1, as old disks have them; not UTF-8."""


def configured(tmp_path: Path, classes: Sequence[str], suffix: str = "", images: int = 3) -> Path:
    torch.set_num_threads(1)
    for number, name in enumerate(classes):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for image in range(images):
            pixels = np.random.default_rng(number + 10 * image).integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}{suffix}.png")
    (tmp_path / "config.yaml").write_text(
        f"data: {{source: images, path: '{tmp_path / 'data'}'}}\n"
        "model: {variant: unet-conv, model_channels: 32, channel_mult: [1], layers_per_block: 1}\n"
        "training: {steps: 1, batch_size: 2, warmup_steps: 1, tensorboard: false}\n"
        f"sampling: {{num_inference_steps: 2}}\noutput: '{tmp_path / 'run'}'\n"
    )
    return tmp_path / "config.yaml"


def test_names_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path, CLASSES)
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


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse names that are not UTF-8")
def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path, (LATIN, "plain"), suffix=LATIN, images=12)
    assert call("check", config) == 0
    assert call("train", config) == 0
    assert call("train", config, "training.steps=2") == 0  # with the split of before
    assert call("sample", tmp_path / "run", "-n", "1", "--class", LATIN) == 0
    assert call("evaluate", tmp_path / "run", "-n", "6") == 0
    split = RunFolder(tmp_path / "run").split()
    assert {Path(name).name.partition(".")[0] for name in split["train"]} >= {f"0{LATIN}"}
    assert "caf\\udce9" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    other = tmp_path / LATIN
    assert call("train", config, f"output={other}") == 1
    assert "its name is not UTF-8" in capsys.readouterr().err
    assert not other.exists()
