"""Files of a finished run that a disk has damaged: never used in silence, and made again from the checkpoint."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_cli import call


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run at its place, as its configuration names the folder."""
    kept = tmp_path / "kept"
    shutil.copytree(finished, kept)
    yield finished
    shutil.rmtree(finished)
    shutil.copytree(kept, finished)


def sampled(run: Path, out: Path) -> np.ndarray:
    assert call("sample", run, "-n", "1", "--seed", "3", "--out", out) == 0
    return np.asarray(Image.open(out / "grid.png"))


def flipped(path: Path) -> None:
    """One bit of the last tensor, as a worn disk flips it."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    """Another digit, as a worn disk or a curious hand leaves it."""
    content = path.read_text()
    at = next(index for index, character in enumerate(content) if character in "123456789")
    path.write_text(content[:at] + "0" + content[at + 1 :])


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CASES = [
    (WEIGHTS, flipped, "not the file that was written"),
    (WEIGHTS, cut, "not the file that was written"),
    (WEIGHTS, Path.unlink, "missing"),
    ("unet/config.json", cut, "not readable as JSON"),
    ("scheduler/scheduler_config.json", cut, "not the file that was written"),
    ("model_index.json", cut, "not readable as JSON"),
    ("weights.json", cut, "not readable as JSON"),
    ("weights.json", changed, "checksum differs"),
    ("data.json", changed, "checksum differs"),
    ("data.json", cut, "not readable as JSON"),
]


@pytest.mark.parametrize(("file", "damage", "message"), CASES, ids=[f"{f}-{d.__name__}" for f, d, _ in CASES])
def test_a_damaged_file_is_refused_and_made_again_by_training(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    before, weights = sampled(run, tmp_path / "before"), (run / WEIGHTS).read_bytes()
    damage(run / file)
    capsys.readouterr()
    assert call("sample", run, "-n", "1", "--out", tmp_path / "damaged") == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(run / file) in error
    assert "heterodiff train" in error
    assert call("train", run / "config.yaml") == 0
    assert (run / WEIGHTS).read_bytes() == weights
    np.testing.assert_array_equal(sampled(run, tmp_path / "after"), before)


def test_a_pipeline_lists_its_files(run: Path) -> None:
    listed = json.loads((run / "weights.json").read_text())
    assert listed["step"] == 2
    assert sorted(listed["files"]) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS,
    ]


def test_pipelines_of_earlier_versions_list_none(run: Path, tmp_path: Path) -> None:
    (run / "weights.json").write_text('{"step": 2}')
    assert sampled(run, tmp_path / "out").size
    assert call("train", run / "config.yaml") == 0


@pytest.mark.parametrize("damage", [changed, cut])
def test_a_damaged_split_is_refused_and_made_again(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    before = (run / "split.json").read_bytes()
    damage(run / "split.json")
    assert call("evaluate", run, "-n", "20") == 1
    assert f"`heterodiff train {run / 'config.yaml'}` makes it again from the images" in capsys.readouterr().err
    assert call("train", run / "config.yaml") == 0
    assert "made again from the images" in capsys.readouterr().out
    assert (run / "split.json").read_bytes() == before
