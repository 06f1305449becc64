"""Calibrating and evaluating a run that finds anomalies, on its validation and its test images."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from heterodiff.config import DataConfig
from heterodiff.config_file import load_config
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import load_test, open_source
from heterodiff.data.volumes import fingerprint
from heterodiff.diffusion.anomaly import AnomalyMaps
from heterodiff.errors import DataError, RunError
from heterodiff.evaluation.progress import progress_tasks
from heterodiff.evaluation.report import ANOMALIES_PICTURE, write_report
from heterodiff.evaluation.run import Evaluation, count_seen, image_config, run_data
from heterodiff.evaluation.segmentation import evaluate_segmentation
from heterodiff.pictures import GREEN, RED, image_grid, tinted
from heterodiff.pipelines.anomaly_masks import calibrate
from heterodiff.pipelines.load import CONFIG_FILE, load_generation, load_spec
from heterodiff.pipelines.segment import Segmentation, Segmenter, load_calibration, save_calibration

IMAGES_AT_ONCE = 32
SHOWN, SHOWN_SIDE = 8, 128


def finds_anomalies(run: Path, elsewhere: DataConfig | None = None) -> bool:
    """Whether the run's images, or those ``elsewhere``, have masks to compare with."""
    if not (run / CONFIG_FILE).is_file() or load_config(run / CONFIG_FILE).recipe != "diffusion":
        return False
    return open_source(elsewhere or image_config(run)).mask is not None


def other_patients(run: Path, path: Path) -> DataConfig | None:
    """How the patients at ``path``, a folder of volumes or an npz file of slices, are read as those of the run were.

    ``None`` for a run that was not trained on slices of volumes, real or simulated.

    Raises:
        DataError: nothing is at ``path``, or no masks, though the run's own images have some.
    """
    if not (run / CONFIG_FILE).is_file() or image_config(run).source not in ("volumes", "brain-phantom"):
        return None
    if not path.expanduser().exists():
        raise DataError(f"{path}: no such folder or npz file; correct --data")
    config = image_config(run)
    volumes = config.volumes.model_copy(update={"cache": None})
    found = config.model_copy(update={"source": "volumes", "path": path, "volumes": volumes})
    if open_source(found).mask is None and finds_anomalies(run):
        raise DataError(f"{path}: no masks to compare with; `heterodiff segment {run} {path}` finds anomalies without")
    return found


def _all_maps(segmenter: Segmenter, images: ImageDataset, progress: Callable[[int], None]) -> Iterator[AnomalyMaps]:
    for first in range(0, len(images), IMAGES_AT_ONCE):
        count = min(IMAGES_AT_ONCE, len(images) - first)
        part = images.batch(range(first, first + count))[0]
        yield segmenter.maps(part, first, lambda step, total, f=first, c=count: progress(f + c * step // total))  # type: ignore[misc]


def calibrate_run(run: Path) -> list[str]:
    """Learn the limits of masks from the run's validation images and their labels, and keep them in the run.

    Returns:
        what was found, a line each.

    Raises:
        HeterodiffError: no usable run, or validation images that do not allow it.
    """
    data = run_data(run)  # says what is missing of the run
    settings = load_config(run / CONFIG_FILE).segmentation
    segmenter = Segmenter(load_generation(run), settings)
    classes = data.spec.class_names
    alone = settings.method == "partial-noising"  # which needs no unhealthy images; those without labels are healthy
    if settings.healthy not in classes and (classes or not alone):
        raise RunError(
            f"{run}: calibration needs validation images of class '{settings.healthy}' and others, found classes "
            f"{', '.join(classes) or 'none'}; label them, or correct segmentation.healthy"
        )
    with progress_tasks() as start:
        found = list(_all_maps(segmenter, data.val, start("validation images", len(data.val))))
    labels = data.val.labels
    known = labels >= 0 if classes else np.full(len(labels), True)
    unhealthy = labels != classes.index(settings.healthy) if classes else ~known
    divergence, score = (torch.cat([getattr(one, name) for one in found]).numpy() for name in ("divergence", "score"))
    calibration = calibrate(divergence[known], score[known], unhealthy[known], alone)
    config = image_config(run)
    made = fingerprint(config) if config.source == "volumes" else None
    path = save_calibration(run, calibration, settings, made)
    total = calibration.healthy + calibration.unhealthy
    if not calibration.unhealthy:
        return [
            f"images   {calibration.healthy} validation images, taken for healthy",
            "decision one of twenty of these is judged unhealthy; with unhealthy ones the limit would be better",
            f"wrote    {path}",
        ]
    return [
        f"images   {calibration.healthy} healthy and {calibration.unhealthy} unhealthy validation images",
        f"decision {total - calibration.errors} of {total} judged as labelled",
        f"wrote    {path}",
    ]


def evaluate_anomalies(run: Path, elsewhere: DataConfig | None = None) -> Evaluation:
    """Find anomalies in the run's test images and compare them with the true masks; one pass over all of them.

    Writes ``evaluation/segmentation.png``, ``evaluation.json`` and ``report.html`` into the run folder.

    Args:
        elsewhere: other images, all of which are measured in place of the run's, see :func:`other_patients`.

    Raises:
        HeterodiffError: no usable run, not calibrated, or no test images.
    """
    config = load_config(run / CONFIG_FILE)
    calibration = load_calibration(run, config.segmentation)
    spec = load_spec(run)
    if spec is None:
        raise RunError(f"{run}: data.json is missing, so the run's images are not known here")
    of = elsewhere or image_config(run)
    test = load_test(of, spec, "all" if elsewhere else "test")
    assert test.mask is not None  # asked before, by `finds_anomalies`
    segmenter = Segmenter(load_generation(run), config.segmentation)
    count = len(test.images)
    with progress_tasks() as start:
        maps = _all_maps(segmenter, test.images, start("test images", count))
        parts, calls = zip(*((segmenter.masks(one, calibration), one.calls) for one in maps), strict=True)
    found = Segmentation.join(parts)
    truth = np.stack([test.mask(row) for row in range(count)])
    images = test.images.batch(range(count))[0]
    seen = images[:, segmenter.channels]
    metrics = evaluate_segmentation(
        found.masks, found.unhealthy, found.maps, found.score, truth, test.patients, seen.numpy()
    )
    notes = []
    if elsewhere and (seen_before := count_seen(images, run_data(run).train)):
        notes.append(f"{seen_before:,} of these {count:,} images are training images too: they are not held out")
    part = "all" if elsewhere else "kept for testing"
    metrics["data"] = {"path": str(of.path or of.source), "part": part, "notes": notes}
    metrics["settings"] = config.segmentation.model_dump(mode="json")
    metrics["calls_per_image"] = float(torch.cat(calls).float().mean())
    picture = run / ANOMALIES_PICTURE
    picture.parent.mkdir(exist_ok=True)
    overlays(seen, truth, found).save(picture)
    (run / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
    return Evaluation(metrics, picture, write_report(run))


def overlays(images: Tensor, truth: np.ndarray, found: Segmentation) -> Image:
    """Some images with a lesion and some without, as a row each: first channel, true mask, found mask, map."""
    ill = np.asarray(truth.any(axis=(1, 2)))
    with_lesion, without = np.flatnonzero(ill), np.flatnonzero(~ill)
    few = min(len(without), SHOWN // 4)
    chosen = np.concatenate([_spread(with_lesion, SHOWN - few), _spread(without, few)])
    grey = images[chosen, :1].expand(-1, 3, -1, -1)
    maps = torch.from_numpy(found.maps[chosen]).float()[:, None]
    maps = (maps / maps.quantile(0.995).clamp(min=1e-6)).clamp(0, 1).expand(-1, 3, -1, -1)
    true, marked = (torch.from_numpy(masks[chosen]) for masks in (truth, found.mixed_masks))
    rows = [grey, tinted(grey, true, GREEN), tinted(grey, marked, RED), maps]
    names = ["image", "true mask", "found", "anomaly map"]
    return image_grid(torch.cat(rows), names, columns=len(chosen), min_side=SHOWN_SIDE)


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)] if len(rows) else rows


def segmentation_summary(metrics: dict[str, Any]) -> list[str]:
    """The main numbers of an evaluation, a line each."""
    lines = []
    for name, title in (("unhealthy", "images with a lesion"), ("mixed", "all images")):
        part = metrics[name]
        if part["dice"]["n"]:
            auprc = f", AUPRC {100 * part['auprc']:.1f} %" if "auprc" in part else ""
            lines.append(
                f"masks    {title}: Dice {_interval(part['dice'])}, IoU {_interval(part['iou'])}{auprc} "
                f"({part['dice']['n']} images)"
            )
    for row in metrics.get("sizes", []):
        low, high = row["pixels"]
        lines.append(f"masks      {row['size']} lesions, {low} to {high} pixels: Dice {_interval(row['dice'])}")
    if threshold := metrics.get("threshold"):
        lines.append(
            f"compare  the best threshold ({threshold['of']} above {threshold['threshold']:.2f}): "
            f"Dice {100 * threshold['dice']:.1f} %"
        )
    image = metrics["image"]
    if image["auroc"] is not None:
        shares = (f"{key} {_percent(image[key])}" for key in ("precision", "recall", "accuracy"))
        lines.append(f"images   judged as a whole: AUROC {image['auroc']:.3f}, {', '.join(shares)}")
    area = metrics["healthy"]["false_positive_area"]
    if area["n"]:
        lines.append(f"healthy  {100 * area['mean']:.2f} % of the area of {area['n']} healthy images marked")
    lines.append(f"calls    {metrics['calls_per_image']:.0f} of the network an image")
    lines += [f"note     {note}" for note in metrics["data"]["notes"]]
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(part: dict[str, Any]) -> str:
    return f"{100 * part['mean']:.1f} % [{100 * part['low']:.1f}, {100 * part['high']:.1f}]"
