"""Lower-grade gliomas of 60 patients, found by networks that saw image labels alone; three folds of patients.

The slices are those of ``lgg_slices`` (TCGA-LGG; Buda et al. 2019), scaled by patient and channel. "Healthy" is a slice
without lesion of a patient who has one, and most of these lie at the top and the bottom of the head: the middle
(:data:`MIDDLE`) is reported apart, and the height of a slice beside the scores.
"""

from pathlib import Path

import numpy as np

from heterodiff.config import RunConfig
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs

FOLDS = 3
MIDDLE = (0.35, 0.85)
STEPS = 6500
"""About 25 minutes on one thread."""


def slices_file(runs: Path, data: Path) -> Path:
    """Write the slices as ``source: volumes`` reads them, numbered by their height in thousandths."""
    path = runs / "lgg_slices.npz"
    if not path.is_file():
        with np.load(data / "lgg_slices" / "lgg_slices.npz") as found:
            image, mask, patient, height = (found[key] for key in ("image", "mask", "patient", "height"))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, image=image, mask=mask, patient=patient, z=np.round(1000 * height).astype(int))
    return path


def fold_patients(path: Path, fold: int) -> list[str]:
    """The test patients of a fold."""
    with np.load(path) as found:
        patients = np.random.default_rng(0).permutation(np.unique(found["patient"]))
    return [str(name) for name in patients[fold::FOLDS]]


def configure(runs: Path, data: Path, fold: int, name: str = "lgg", *changes: str) -> RunConfig:
    """The run of a fold: trained on 32 patients, thresholds from 8, tested on 20."""
    path = slices_file(runs, data)
    overrides = [
        f"data.path={path}",
        f"data.test_patients={fold_patients(path, fold)}",
        "data.split_by=patient",
        f"training.steps={STEPS}",
        "training.preview_every=100000",
        "training.tensorboard=false",
        "segmentation.smoothing=5",
        "segmentation.drop_small=null",
        f"output={runs / f'{name}_{fold}'}",
    ]
    return load_config(shipped_configs() / "ms_slices.yaml", [*overrides, *changes])
