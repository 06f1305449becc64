"""Configurations to start from: short, commented, accepted, and usable with the data they are meant for."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from heterodiff.cli import main
from heterodiff.config.file import load_config
from heterodiff.config.starter import BUILT_IN, STARTERS, write_starter
from heterodiff.errors import ConfigError

RNG = np.random.default_rng(0)
TASKS = ("digits", "images", "captions", "mri", "radar")
SMALL = {
    "digits": [],
    "images": ["data.image_size=8"],
    "captions": ["data.image_size=8", "codec.training.batch_size=2", "text.width=32", "text.layers=1"],
    "mri": ["data.image_size=8"],
    "radar": ["data.microdoppler.images_per_class=2", "data.image_size=16"],
}


def call(*arguments: str | Path) -> int:
    """Exit code of ``heterodiff arguments``."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def pictures(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")


def classes(root: Path) -> None:
    for name in ("bird", "drone"):
        pictures(root / name)


def captions(root: Path) -> None:
    pictures(root, 6)
    (root / "metadata.csv").write_text("file_name,text\n" + "".join(f"{k}.png,picture number {k}\n" for k in range(6)))


def patients(root: Path) -> None:
    for name in ("p1", "p2", "p3"):
        (root / name).mkdir(parents=True)
        for kind in ("flair", "t1", "t1ce", "t2", "seg"):
            voxels = RNG.normal(100, 10, (8, 8, 6)).astype(np.float32)
            if kind == "seg":
                voxels = np.zeros((8, 8, 6), np.uint8)
                voxels[2:5, 2:5, 3:] = 1  # the lower slices are healthy
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), root / name / f"{name}_{kind}.nii.gz")


DATA: dict[str, Callable[[Path], None]] = {"images": classes, "captions": captions, "mri": patients}


def test_every_task_is_tested() -> None:
    assert set(STARTERS) == set(TASKS) == set(BUILT_IN) | set(DATA)


@pytest.mark.parametrize("task", TASKS)
def test_file_is_short_and_every_value_has_a_comment(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("init", task) == 0
    path = Path(f"my_{task}.yaml")
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"wrote    {path}"
    assert f"heterodiff {'train' if task in BUILT_IN else 'check'} {path}" in printed
    lines = path.read_text().splitlines()
    assert 5 <= len(lines) <= 15
    assert max(map(len, lines)) <= 120
    for before, line in zip(["", *lines], lines, strict=False):
        if not line.rstrip().endswith(":"):
            assert "#" in line or "the next line" in before, line
    config = load_config(path)
    assert config.output == Path(f"runs/my_{task}")
    assert (config.data.path is None) == (task in BUILT_IN)
    assert config.codec.path is None or config.codec.path.name == "alignment"


@pytest.mark.parametrize("task", TASKS)
def test_settings_are_checked_or_tried_out(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """``heterodiff train FILE --dry-run`` on what is built in, else ``heterodiff check FILE``, on small images."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_starter(task, Path("mine.yaml"))
    small = ["training.batch_size=2", *SMALL[task]]
    if task in BUILT_IN:
        assert call("train", "mine.yaml", "--dry-run", *small) == 0
        assert capsys.readouterr().out.endswith("nothing was written\n")
        return
    assert call("check", "mine.yaml", *small) == 1  # the data are still to be named
    assert "data.path" in capsys.readouterr().err
    DATA[task](tmp_path / "data")
    assert call("check", "mine.yaml", "data.path=data", *small) == 0
    printed = capsys.readouterr().out
    assert "pass  loss" in printed
    assert "FAIL" not in printed


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {source: digits}\n")
    assert call("init", "radar", "--out", path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: exists already")
    assert path.read_text() == "data: {source: digits}\n"


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        write_starter("digit", tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="YAML file"):
        write_starter("digits", tmp_path / "a.txt")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_starter("digits", tmp_path / "file" / "a.yaml")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_starter("digits", tmp_path / "missing" / "a.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
