"""Calls whose work several processes share, as torchrun starts them, find what one process finds."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from heterodiff.pipelines.anomalies.calibrated import save_calibration
from heterodiff.pipelines.sharing import Team
from heterodiff.training.start import train
from tests.reliability.test_processes import SMALL, launch
from tests.test_data_volumes import patients
from tests.test_pipelines_segment_files import CALIBRATION, settings
from tests.training_runs import tiny_config


def test_items_are_shared_and_come_back_in_order() -> None:
    teams = [Team(rank, 3) for rank in range(3)]
    assert sorted(item for team in teams for item in team.own(range(10))) == list(range(10))
    assert [team.each(10, 100) for team in teams] == [4, 4, 4]
    assert Team().each(10, 100) == 10
    assert Team().each(0, 100) == 1
    assert Team().collect(iter([3, 1])) == [3, 1]


@pytest.mark.slow
def test_sample_and_evaluate(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(run, **SMALL, training__steps=4), quiet=True)
    for count in (1, 3):
        command = ("sample", str(run), "-n", "2", "--out", str(tmp_path / f"by{count}"))
        printed = launch(count, "heterodiff.cli", *command)
        assert printed.count("drawn ") == 1  # the first process reports for all
    one, three = (sorted((tmp_path / f"by{count}").iterdir()) for count in (1, 3))
    assert [path.name for path in one] == [path.name for path in three]
    assert len(one) == 42  # arrays and pictures of ten classes, a grid and settings.json
    for path, other in zip(one, three, strict=True):
        if path.suffix == ".png":
            images = [np.asarray(Image.open(file), np.int64) for file in (path, other)]
            assert abs(images[0] - images[1]).max() <= 1
        elif path.suffix == ".npy":
            np.testing.assert_allclose(np.load(path), np.load(other), atol=0.01)  # of 0 to 16
        else:
            assert path.read_bytes() == other.read_bytes()
    found = []
    for count in (1, 3):
        launch(count, "heterodiff.cli", "evaluate", str(run), "-n", "5")
        found.append(json.loads((run / "evaluation.json").read_text()))
    assert found[0]["sizes"] == found[1]["sizes"]
    assert found[0]["frechet_distance"]["generated"] == pytest.approx(
        found[1]["frechet_distance"]["generated"], rel=1e-3
    )


@pytest.mark.slow
def test_segment_shares_the_patients(tmp_path: Path) -> None:
    data = patients(tmp_path / "data")
    config = settings(tmp_path / "run", data)
    train(config, quiet=True)
    save_calibration(tmp_path / "run", CALIBRATION, config.segmentation)
    names = sorted(path.name for path in data.iterdir())
    broken = next((data / names[1]).glob("*flair*"))
    broken.write_bytes(broken.read_bytes()[:100])
    tables = []
    for count in (1, 2):
        out = tmp_path / f"by{count}"
        with pytest.raises(AssertionError, match=broken.name):  # one patient is left out, and the exit code is 1
            launch(count, "heterodiff.cli", "segment", str(tmp_path / "run"), str(data), "--out", str(out))
        with (out / "patients.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    assert [row["patient"] for row in tables[0]] == [name for name in names if name != names[1]]
    assert tables[0] == tables[1]
    for row in tables[0]:
        masks = [
            np.asarray(nibabel.load(tmp_path / by / row["patient"] / "mask.nii.gz").dataobj) for by in ("by1", "by2")
        ]
        np.testing.assert_array_equal(*masks)
