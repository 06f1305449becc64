"""Data sets of the package datasets on disk give the images, classes and captions that they hold."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heterodiff.config import DataConfig
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError
from tests.test_cli import call

datasets = pytest.importorskip("datasets")
ROWS = 24


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def pixels(number: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 16, channels), dtype=np.uint8).squeeze()


def made(rows: range = range(ROWS), **columns: Any) -> Any:
    """Pictures of three classes, with further columns."""
    content = {
        "image": [Image.fromarray(pixels(number)) for number in rows],
        "label": [number % 3 for number in rows],
        "text": [f"a {number % 3}" for number in rows],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"]), "text": text()}
    content |= {key: values for key, (values, _) in columns.items()}
    features |= {key: feature for key, (_, feature) in columns.items()}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def text() -> Any:
    return datasets.Value("string")


def saved(data: Any, folder: Path, kind: str) -> Path:
    if kind == "folder":
        data.save_to_disk(folder / "data")
        return folder / "data"
    (folder / "data").mkdir()
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder / "data" if kind == "parquet folder" else folder / "data" / "train-00000-of-00001.parquet"


def config(path: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"source": "hf-dataset", "path": path, "val_fraction": 0.25, **settings})


KINDS = ["folder", "parquet folder", "parquet file"]


@pytest.mark.parametrize("memory_limit_gb", [4.0, 1e-9])
@pytest.mark.parametrize("kind", KINDS)
def test_images_and_classes(kind: str, memory_limit_gb: float, tmp_path: Path) -> None:
    data = load_data(config(saved(made(), tmp_path, kind), memory_limit_gb=memory_limit_gb))
    assert data.spec.class_names == ("a", "b", "c")
    assert len(data.train) + len(data.val) == ROWS
    for part in (data.train, data.val):
        images, labels = part.batch(range(len(part)))
        for name, image, label in zip(part.names, images, labels.tolist(), strict=True):
            number = int(name.removeprefix("train/"))
            np.testing.assert_allclose(image.numpy()[0] * 255, pixels(number), atol=1e-4)
            assert label == number % 3


@pytest.mark.parametrize("kind", KINDS)
def test_captions(kind: str, tmp_path: Path) -> None:
    data = load_data(config(saved(made(), tmp_path, kind), labels="none"))
    for name, label in zip(data.train.names, data.train.labels, strict=True):
        assert data.captions[label] == (f"a {int(name.removeprefix('train/')) % 3}",)


def test_its_own_validation_images_are_held_out(tmp_path: Path) -> None:
    parts = {"train": made(range(18)), "validation": made(range(18, 24)), "test": made(range(24, 30))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    data = load_data(config(tmp_path / "data"))
    assert (len(data.train), len(data.val)) == (18, 6)
    assert set(data.val.names) == {f"validation/{row}" for row in range(6)}


def test_arrays_of_any_number_type_and_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(ROWS, 2, 8, 8)).astype(np.float32)
    features = datasets.Features({"image": datasets.Array3D((2, 8, 8), "float32"), "label": text()})
    content = {"image": list(values), "label": [f"class {row % 2}" for row in range(ROWS)]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "data")
    data = load_data(config(tmp_path / "data", channels=2, value_range=(-5, 5)))
    assert (data.spec.channels, data.spec.class_names) == (2, ("class 0", "class 1"))
    first = int(data.train.names[0].removeprefix("train/"))
    np.testing.assert_allclose(data.train[0][0].numpy() * 10 - 5, values[first], atol=1e-5)


def test_unlabelled_rows_have_no_class(tmp_path: Path) -> None:
    data = made()
    content = data.remove_columns("label").add_column("label", [-1 if row < 6 else row % 3 for row in range(ROWS)])
    path = saved(content.cast_column("label", data.features["label"]), tmp_path, "folder")
    data = load_data(config(path, val_fraction=0.0))
    assert (data.train.labels == -1).sum() == 6


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_data(config(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a folder that save_to_disk wrote"):
        load_data(config(tmp_path / "empty"))
    plain = datasets.Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]})
    plain.save_to_disk(tmp_path / "plain")
    with pytest.raises(DataError, match=r"expected one column of images.* found the columns a \(Value\), b \(Value\)"):
        load_data(config(tmp_path / "plain"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match="not readable as a data set"):
        load_data(config(tmp_path / "bad.parquet"))
    path = saved(made(), tmp_path, "folder")
    for file in path.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match=str(path)):
        load_data(config(path))


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    data = made(other=([None if row == 3 else Image.fromarray(pixels(row)) for row in range(ROWS)], datasets.Image()))
    path = saved(data.remove_columns("image").rename_column("other", "image"), tmp_path, "folder")
    with pytest.raises(DataError, match=r"train/3.*no image"):
        load_data(config(path))
    assert len(load_data(config(path, on_bad="skip", val_fraction=0.0)).train) == ROWS - 1


def test_rows_without_a_caption_are_named_or_left_out(tmp_path: Path) -> None:
    texts = [None if row == 3 else " " if row == 5 else f"a {row}" for row in range(ROWS)]
    path = saved(made(caption=(texts, text())).remove_columns("text"), tmp_path, "folder")
    assert not load_data(config(path)).captions  # classes are used
    with pytest.raises(DataError, match=r"train/3.*the caption is empty"):
        load_data(config(path, labels="none"))
    data = load_data(config(path, labels="none", on_bad="skip", val_fraction=0.0))
    assert data.train.names == [f"train/{row}" for row in range(ROWS) if row not in (3, 5)]
    assert [data.captions[label] for label in data.train.labels] == [
        (f"a {row}",) for row in range(ROWS) if row not in (3, 5)
    ]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_training_through_the_command_line(workers: int, tmp_path: Path) -> None:
    path = saved(made(), tmp_path, "parquet folder")
    (tmp_path / "config.yaml").write_text(
        f"data: {{source: hf-dataset, path: '{path}', memory_limit_gb: 1.0e-9}}\n"
        "model: {variant: unet-conv, model_channels: 32, channel_mult: [1], layers_per_block: 1}\n"
        f"training: {{steps: 3, batch_size: 4, warmup_steps: 1, tensorboard: false, num_workers: {workers}}}\n"
        f"sampling: {{num_inference_steps: 2}}\noutput: '{tmp_path / 'run'}'\n"
    )
    assert call("check", tmp_path / "config.yaml") == 0
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "heterodiff.cli", "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "weights.json").is_file()
