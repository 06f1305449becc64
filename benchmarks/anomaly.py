"""Anomalies from image labels alone: how well, on simulated heads and on real slices, and what faster steps cost.

    python -m benchmarks.anomaly --runs runs phantom     train (or go on with) the shipped run, calibrate, evaluate
    python -m benchmarks.anomaly --runs runs others      the same on heads of another seed, on which nothing was chosen
    python -m benchmarks.anomaly --runs runs steps       its Dice with a tenth of the steps, with all, and with patience
    python -m benchmarks.anomaly --runs runs variants    hae-v2 and unet at 32x32, for the same time, two seeds
    python -m benchmarks.anomaly --runs runs ms          three real patients, each by a model of the other two
    python -m benchmarks.anomaly --runs runs lgg         sixty real patients in three folds, beside other ways
    python -m benchmarks.anomaly --runs runs healthy     the same patients by networks trained on healthy slices alone
    python -m benchmarks.anomaly --runs runs volume      minutes for a volume of 155 slices

All but the last take about an hour each on two CPU cores, and goes on where it was interrupted. Writes
benchmarks/results/anomaly_{phantom,others,steps,variants,ms,lgg,healthy,volume}.json and pictures to docs/images.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lgg import healthy, lgg
from benchmarks.measure import machine, write_results
from benchmarks.runs import ROOT, seconds_of, to_the_end
from heterodiff.config import SegmentationConfig
from heterodiff.config.file import load_config, parse_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.config.starter import write_starter
from heterodiff.data.sources import load_test, open_source
from heterodiff.evaluation.anomalies import evaluate_anomalies
from heterodiff.evaluation.calibration import calibrate_run
from heterodiff.evaluation.runs import image_config, run_data
from heterodiff.memory import keep_freed_memory
from heterodiff.metrics.segmentation import overlap, patient_interval
from heterodiff.pipelines.anomalies.calibrated import save_calibration
from heterodiff.pipelines.anomalies.files import segment_folder
from heterodiff.pipelines.anomalies.label_weights import LabelWeights
from heterodiff.pipelines.anomalies.mask_network import MaskNetwork, new_network
from heterodiff.pipelines.anomalies.masks import Calibration, calibrate
from heterodiff.pipelines.anomalies.segment import Segmenter
from heterodiff.pipelines.load import load_generation
from heterodiff.report.writing import summary_lines
from heterodiff.run_folder import RunFolder
from heterodiff.training.preflight.trial import trial

DATA = Path(os.environ.get("HETERODIFF_DATA") or ROOT.parent / "shared" / "data") / "ms_lesion_slices"
PATIENTS, SHOWN_PATIENT = ("7", "19", "26"), "19"
SLICES = 155
COMPARED = 40
"""Test images with a lesion that are segmented with all steps, each of which takes ten times as long."""
VARIANTS = ("unet", "hae-v2")
MINUTES, TIMED_STEPS = 10, 10
SEEDS = range(2)
OTHER_SEED, OTHER_PATIENTS = 1, 24


def _found(run: Path, overrides: list[str], name: str, picture: str | None = None) -> dict[str, Any]:
    """Train the shipped configuration ``name`` in ``run``, calibrate and evaluate it."""
    config = load_config(shipped_configs() / f"{name}.yaml", [f"output={run}", *overrides])
    to_the_end(config)
    for line in calibrate_run(run):
        print(line)
    found = evaluate_anomalies(run)
    for line in summary_lines(found.metrics):
        print(line, flush=True)
    if picture:
        shutil.copy(found.picture, ROOT / "docs" / "images" / f"{picture}.png")
    found.metrics["data"]["path"] = Path(found.metrics["data"]["path"]).name  # results name no place of this machine
    return {"training_seconds": seconds_of(run), **found.metrics}


def phantom(runs: Path, data: Path) -> dict[str, Any]:
    """The shipped run on simulated heads."""
    return _found(runs / "phantom", [], "phantom", "anomaly_phantom")


def others(runs: Path, data: Path) -> dict[str, Any]:
    """The trained and calibrated run on heads of another seed, after all choices were made."""
    config = load_config(runs / "phantom" / "config.yaml").data
    drawn = config.brain_phantom.model_copy(update={"seed": OTHER_SEED, "patients": OTHER_PATIENTS})
    found = evaluate_anomalies(runs / "phantom", config.model_copy(update={"brain_phantom": drawn}))
    for line in summary_lines(found.metrics):
        print(line, flush=True)
    return found.metrics


def steps(runs: Path, data: Path) -> dict[str, Any]:
    """What fewer steps cost, on the same images: calibrated and measured with each number of steps."""
    run = runs / "phantom"
    settings, pipeline = load_config(run / "config.yaml").segmentation, load_generation(run)
    val = run_data(run).val
    spec = RunFolder(run).spec()
    assert spec is not None
    test = load_test(image_config(run), spec, split=RunFolder(run).split())
    assert test.mask is not None
    truth = np.stack([test.mask(row) for row in range(len(test.images))])
    ill = np.flatnonzero(truth.any(axis=(1, 2)))
    rows = (np.arange(len(val)), ill)
    held_out, tested = (of[np.linspace(0, len(of) - 1, COMPARED).astype(int)] for of in rows)
    truth, patients = truth[tested], np.array(test.patients)[tested]
    unhealthy = val.labels[held_out] != spec.class_names.index(settings.healthy)

    def measure(changed: SegmentationConfig) -> tuple[np.ndarray, dict[str, Any]]:
        segmenter, start = Segmenter(pipeline, changed), time.perf_counter()
        known = segmenter.maps(val.batch(held_out)[0])
        limits = calibrate(known.divergence.numpy(), known.score.numpy(), unhealthy)
        maps = segmenter.maps(test.images.batch(tested)[0])
        dice = overlap(segmenter.masks(maps, limits).masks, truth)[0]
        calls = float(maps.calls.float().mean())
        return dice, {"dice": float(dice.mean()), "calls": calls, "seconds": time.perf_counter() - start}

    ways = {
        "all": {"num_inference_steps": settings.depth},
        "default": {},
        "patience 10": {"patience": 10},
        "half": {"num_inference_steps": settings.num_inference_steps // 2},
    }
    result: dict[str, Any] = {"images": COMPARED, **machine()}
    every, result["all"] = measure(settings.model_copy(update=ways.pop("all")))
    for name, changes in ways.items():
        dice, found = measure(settings.model_copy(update=changes))
        low, high = patient_interval(dice - every, patients)
        result[name] = {**found, "difference": float((dice - every).mean()), "low": low, "high": high}
        print(
            f"{name:12} Dice {100 * found['dice']:.1f} %, {100 * (dice - every).mean():+.1f} points from all",
            flush=True,
        )
    return result


def variants(runs: Path, data: Path) -> dict[str, Any]:
    """The hybrid and the plain U-Net, trained for the same time as both are timed beside each other at the start."""
    shared = ["data.image_size=32", "model.patch_size=1", "data.test_fraction=0.1"]
    shared.append("segmentation.num_inference_steps=13")  # measuring should not take longer
    plan = runs / "anomaly_variants.json"
    if not plan.is_file():  # what was begun keeps its number of steps, however fast the machine is later
        seconds = _step_seconds({name: [*shared, f"model.variant={name}"] for name in VARIANTS})
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_text(json.dumps({name: round(60 * MINUTES / one) for name, one in seconds.items()}))
    result: dict[str, Any] = {"minutes": MINUTES, **machine()}
    for seed in SEEDS:
        for variant, count in json.loads(plan.read_text()).items():
            changes = [*shared, f"model.variant={variant}", f"training.seed={seed}", f"training.steps={count}"]
            found = _found(runs / f"anomaly_{variant}_{seed}", changes, "phantom")
            result.setdefault(variant, []).append({"steps": count, **found})
    return result


def _step_seconds(ways: dict[str, list[str]]) -> dict[str, float]:
    """Median seconds of a training step of each, one of each in turn."""
    trainers = {
        name: trial(load_config(shipped_configs() / "phantom.yaml", overrides))[0] for name, overrides in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TIMED_STEPS):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step_once()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def ms(runs: Path, data: Path) -> dict[str, Any]:
    """Three real patients, each found lesions in by a model of the other two: whether it works, not how well."""
    found = {}
    for patient in PATIENTS:
        overrides = [f"data.path={data / 'ms_slices.npz'}", f"data.test_patients=[{patient!r}]"]
        picture = "anomaly_ms" if patient == SHOWN_PATIENT else None
        found[patient] = _found(runs / f"ms_{patient}", overrides, "ms_slices", picture)
    return found


def volume(runs: Path, data: Path) -> dict[str, Any]:
    """Minutes that ``heterodiff segment`` takes for a patient of 155 slices at 128x128, whatever the weights.

    The denoiser is that of ``heterodiff init mri``, after a single step.
    """
    folder = runs / "volume"
    shutil.rmtree(folder, ignore_errors=True)
    for name, slices in {"a": 12, "b": 12, "new/c": SLICES}.items():
        _write_patient(folder / ("" if "/" in name else "known") / name, slices)
    (folder / "mri.yaml").parent.mkdir(exist_ok=True, parents=True)
    write_starter("mri", folder / "mri.yaml")
    run = folder / "run"
    changes = [f"data.path={folder / 'known'}", "data.image_size=128", "training.steps=1", f"output={run}"]
    changes += ["data.val_fraction=0.3", "data.test_fraction=0", "training.warmup_steps=1", "training.preview_every=9"]
    to_the_end(load_config(folder / "mri.yaml", changes))
    network = MaskNetwork(new_network(4, 128, 128))
    RunFolder(run).save_mask_network(lambda path: network.network.save_pretrained(path, safe_serialization=True))
    weights = LabelWeights((0.0,) * 4 + (1.0, 0.0, 0.0, 0.0), -1.0, 40), LabelWeights((1.0, 0.0, 0.0, 0.0), -1.0, 40)
    known = Calibration((1.0,) * 4, 0.0, 1, 1, 0, *weights)
    minutes = {}
    for name, calibration in {
        "segmentation network": replace(known, network=network.digest),
        "label-difference": known,
    }.items():
        save_calibration(run, calibration, RunFolder(run).config().segmentation)
        start = time.perf_counter()
        rows, problems = segment_folder(run, folder / "new", folder / name.replace(" ", "_"))
        assert not problems, problems
        assert rows[0]["slices"] == SLICES, rows
        minutes[name] = (time.perf_counter() - start) / 60
        print(f"{SLICES} slices at 128x128, {name}: {minutes[name]:.2f} minutes", flush=True)
    return {"slices": SLICES, "minutes": minutes}


def _write_patient(folder: Path, slices: int) -> None:
    """Write a simulated head as four volumes and a mask."""
    import nibabel

    config = parse_config(
        {"data": {"source": "brain-phantom", "image_size": 128, "brain_phantom": {"slices_per_patient": slices}}}
    ).data
    head = open_source(config)
    assert head.mask is not None
    images = np.stack([head.read(row) for row in range(slices)])
    folder.mkdir(parents=True)
    volumes = {name: images[:, k] for k, name in enumerate(("flair", "t1", "t1ce", "t2"))}
    volumes["seg"] = np.stack([head.mask(row) for row in range(slices)]).astype(np.uint8)
    for name, values in volumes.items():
        path = folder / f"{folder.name}_{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(values.transpose(2, 1, 0)), np.eye(4)), path)


MEASURES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "phantom": phantom,
    "others": others,
    "steps": steps,
    "variants": variants,
    "ms": ms,
    "lgg": lgg,
    "healthy": healthy,
    "volume": volume,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="+", choices=MEASURES, help="what to measure")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    keep_freed_memory()
    for name in arguments.names:
        found = MEASURES[name](arguments.runs, arguments.data)
        print(f"wrote {write_results(f'anomaly_{name}', found)}")


if __name__ == "__main__":
    main()
