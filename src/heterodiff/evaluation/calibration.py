"""Calibration of a run that finds anomalies, on its validation images and their labels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from heterodiff.data.dataset import ImageDataset
from heterodiff.data.heights import entangled, held_out_auroc, overlap_weights, patients_and_heights
from heterodiff.data.sources.volumes import channel_names
from heterodiff.devices import Device, DType, dtype_name
from heterodiff.errors import RunError
from heterodiff.evaluation.anomalies import all_maps, parts_of
from heterodiff.evaluation.runs import image_config, run_data
from heterodiff.evaluation.teaching import teach
from heterodiff.pipelines.anomalies.calibrated import DEFAULT_PRECISION, save_calibration
from heterodiff.pipelines.anomalies.known_patients import KnownPatients
from heterodiff.pipelines.anomalies.label_weights import LabelWeights, fit_label_weights
from heterodiff.pipelines.anomalies.masks import Calibration, calibrate, small_area
from heterodiff.pipelines.anomalies.segment import Segmentation, Segmenter, intensity_alone
from heterodiff.pipelines.load import load_generation
from heterodiff.progress import progress_tasks
from heterodiff.run_folder import RunFolder

MOST_PATIENTS = 100
MOST_VALUES = 100_000_000
"""Values of planes that are kept at once: 400 MB. Of more validation images, evenly spread ones are taken."""


def calibrate_run(run: Path, device: Device | None = None, dtype: DType | None = None) -> list[str]:
    """Learn the thresholds of masks from the run's validation images and their labels, and save them in the run.

    With method label-difference, the weights of its planes are learned from these labels, too, and compared with what
    intensities alone and the height of a slice would tell.

    Args:
        device: see :func:`heterodiff.load`.
        dtype: precision of the network, saved with the thresholds and used for masks from then on. Default: float32.

    Returns:
        Lines that describe the calibration.

    Raises:
        HeterodiffError: no usable run, or validation images that do not allow it.
    """
    data = run_data(run)  # reports what is missing of the run
    settings = RunFolder(run).config().segmentation
    segmenter = Segmenter(load_generation(run, device, dtype=dtype or DEFAULT_PRECISION), settings)
    classes = data.spec.class_names
    alone = not segmenter.needs_labels  # nor unhealthy images; unlabelled ones count as healthy
    if settings.healthy not in classes and (classes or not alone):
        raise RunError(
            f"{run}: calibration needs validation images of class '{settings.healthy}' and others, found classes "
            f"{', '.join(classes) or 'none'}; label them, or correct segmentation.healthy"
        )
    images = data.val.take(np.flatnonzero(data.val.labels >= 0).tolist()) if classes else data.val
    unhealthy = images.labels != classes.index(settings.healthy) if classes else np.full(len(images), False)
    notes, source = list[str](), image_config(run).source
    if segmenter.by_labels:
        images, unhealthy, notes = choose_images(images, unhealthy, segmenter)
    val = _Validation.of(images, unhealthy, source)
    with progress_tasks() as start:
        every = all_maps(segmenter, images, start("validation images", len(images)))
        found = [(one.divergence, one.score, one.maps if segmenter.by_labels else one.score) for one in every]
    divergence, score, planes = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    model_helps = True
    if segmenter.by_labels:
        every_name = channel_names(image_config(run), data.spec.channels)
        channels = [every_name[channel] for channel in segmenter.channels]
        area = small_area((data.spec.height, data.spec.width), settings.drop_small) + 1
        weights, model_helps, lines = _weigh(planes, val, channels, area)
        score = weights["evidence"].scores(weights["evidence"].values(planes))
        calibration = replace(calibrate(divergence, score, unhealthy), **weights)
        notes += lines
    else:
        calibration = calibrate(divergence, score, unhealthy, alone)
    if settings.network_steps and calibration.unhealthy:
        calibration, lines = _with_network(run, segmenter, calibration, data.train, val, score, model_helps)
        notes += lines
    known = _known_patients(data.train, data.val, source)
    if known is not None:
        folder = RunFolder(run)
        with folder.writing(folder.known_patients_file):
            known.save(folder.known_patients_file)
    path = save_calibration(run, calibration, settings, dtype_name(segmenter.pipeline.unet.dtype))
    total = calibration.healthy + calibration.unhealthy
    counts = f"{calibration.healthy} healthy and {calibration.unhealthy} unhealthy validation images"
    decision = f"{total - calibration.errors} of {total} judged as labelled"
    if not calibration.unhealthy:
        counts = f"{calibration.healthy} validation images, taken for healthy"
        decision = "one of twenty of these is judged unhealthy; unhealthy images would give a better threshold"
    return [f"images   {counts}", f"decision {decision}", *notes, f"wrote    {path}"]


@dataclass(frozen=True)
class _Validation:
    """Validation images with their labels.

    Attributes:
        unhealthy: (N,) bool.
        patients: (N,) names.
        heights: (N,) of slices in the head, 0 to 1; None where names do not tell.
        importance: (N,) how much each image counts: all the same, or so that both labels have the same heights.
    """

    images: ImageDataset
    unhealthy: np.ndarray
    patients: np.ndarray
    heights: np.ndarray | None
    importance: np.ndarray

    @classmethod
    def of(cls, images: ImageDataset, unhealthy: np.ndarray, source: str) -> "_Validation":
        patients, heights = patients_and_heights(images.names, source)
        importance = np.ones(len(images))
        if heights is not None and 0 < unhealthy.sum() < len(unhealthy):
            importance = overlap_weights(heights, unhealthy)
        return cls(images, unhealthy, patients, heights, importance)


def _with_network(
    run: Path,
    segmenter: Segmenter,
    calibration: Calibration,
    train: ImageDataset,
    val: _Validation,
    of_method: np.ndarray,
    model_helps: bool,
) -> tuple[Calibration, list[str]]:
    """Teach segmentation networks; the calibration with the one that tells the labels of validation images best.

    One learns from the masks that the method finds, of method label-difference one from those of intensities alone.

    Args:
        of_method: (N,) scores of the validation images by the method, which is kept where no network does as well.
        model_helps: False leaves out the network that learns from the method.
    """
    settings, classes = segmenter.settings, train.spec.class_names
    labelled = train.take(np.flatnonzero(train.labels >= 0).tolist())
    unhealthy = labelled.labels != classes.index(settings.healthy)

    def auroc(score: np.ndarray) -> float:
        return float(roc_auc_score(val.unhealthy, score, sample_weight=val.importance))

    def by_method(images: Tensor, first: int) -> Segmentation:
        return segmenter.masks(segmenter.maps(images, first), calibration)

    def by_intensity(images: Tensor, first: int) -> Segmentation:
        return intensity_alone(images.numpy(), calibration, settings, segmenter.channels)

    teachers: dict[str, Callable[[Tensor, int], Segmentation]] = {settings.method: by_method} if model_helps else {}
    if calibration.intensity is not None:
        teachers["intensities alone"] = by_intensity
    options: dict[str, Any] = {
        "steps": settings.network_steps,
        "seed": settings.seed,
        "channels": settings.channels,
    }
    best, told = None, {"no network": auroc(of_method)}
    with progress_tasks() as start:
        for name, teacher in teachers.items():
            network = teach(labelled, unhealthy, teacher, device=segmenter.pipeline.device, start=start, **options)
            if network is None:
                continue
            parts = [network.segment(part, settings.drop_small, 0) for part in parts_of(val.images)]
            score = Segmentation.join(parts).score
            told[f"taught by {name}"] = auroc(score)
            if told[f"taught by {name}"] >= max(told.values()):
                best = network, score
    lines = [f"network  AUROC of validation images: {', '.join(f'{name} {one:.3f}' for name, one in told.items())}"]
    if best is None:
        return calibration, [
            *lines,
            "note     masks are found without a segmentation network: none does better",
        ]
    network, score = best
    folder = RunFolder(run)
    folder.save_mask_network(lambda path: network.network.save_pretrained(path, safe_serialization=True))
    limits = calibrate(np.zeros((len(score), 1)), score, val.unhealthy)
    return replace(calibration, score_limit=limits.score_limit, errors=limits.errors, network=network.digest), lines


def _known_patients(train: ImageDataset, val: ImageDataset, source: str) -> KnownPatients | None:
    """Describe at most a hundred patients, evenly spread; None where names tell no patients."""
    of_names, heights = patients_and_heights([*train.names, *val.names], source)
    if heights is None:
        return None
    every = np.unique(of_names)
    chosen = every[np.linspace(0, len(every) - 1, min(len(every), MOST_PATIENTS)).round().astype(int)]
    images = []
    for patient in chosen:
        rows = np.flatnonzero(of_names == patient)
        in_train, in_val = rows[rows < len(train)], rows[rows >= len(train)] - len(train)
        parts = [part.batch(some.tolist())[0].numpy() for part, some in ((train, in_train), (val, in_val)) if len(some)]
        images.append(np.concatenate(parts))
    return KnownPatients.of(images)


def choose_images(
    images: ImageDataset, unhealthy: np.ndarray, segmenter: Segmenter
) -> tuple[ImageDataset, np.ndarray, list[str]]:
    """Check that there are both labels; take evenly spread images where the planes of all are too large."""
    if not 0 < unhealthy.sum() < len(unhealthy):
        calibrate(np.zeros((len(unhealthy), 1)), np.zeros(len(unhealthy)), unhealthy)  # reports it
    most = max(2, MOST_VALUES // (2 * len(segmenter.channels) * images.spec.height * images.spec.width))
    if len(images) <= most:
        return images, unhealthy, []
    chosen = np.linspace(0, len(images) - 1, most).round().astype(int)
    return images.take(chosen.tolist()), unhealthy[chosen], [f"note     {most:,} of {len(images):,} images were used"]


def _weigh(
    planes: np.ndarray, val: _Validation, channels: list[str], area: int
) -> tuple[dict[str, Any], bool, list[str]]:
    """Fit the weights of all planes and of intensities alone.

    Returns:
        what the calibration keeps of them; whether the model adds to intensities; lines that say so.
    """
    intensities = planes[:, len(channels) :]
    unhealthy, importance = val.unhealthy, val.importance

    def fitted(chosen: np.ndarray, rows: np.ndarray) -> LabelWeights:
        return fit_label_weights(chosen[rows], unhealthy[rows], area, importance[rows])

    def told(chosen: np.ndarray) -> float | None:
        """AUROC of patients that the weights have not seen."""

        def scores(known: np.ndarray, others: np.ndarray) -> np.ndarray:
            found = fitted(chosen, known)
            return found.scores(found.values(chosen[others]))

        return held_out_auroc(scores, unhealthy, val.patients, importance)

    every = np.arange(len(planes))
    evidence, intensity = fitted(planes, every), fitted(intensities, every)
    kinds = [f"{kind} {channel}" for kind in ("difference", "intensity") for channel in channels]
    strengths = np.array(evidence.weights) * planes.std(axis=(0, 2, 3))
    lines = [f"weights  {', '.join(f'{kind} {one:+.2f}' for kind, one in zip(kinds, strengths, strict=True))}"]
    strongest = int(np.abs(strengths).reshape(2, len(channels)).sum(axis=0).argmax())
    weights = {"evidence": evidence, "intensity": intensity, "channel": strongest}
    model, alone = told(planes), told(intensities)
    if model is None or alone is None:
        lines.append("warning  too few patients to tell whether the model adds anything")
        return weights, True, lines
    at = "" if val.heights is None else " at equal heights"
    lines.append(f"AUROC    of patients held out{at}: with the model {model:.3f}, intensities alone {alone:.3f}")
    if alone >= model:
        lines.append("warning  intensities alone do as well: the model adds nothing yet and is not used")
    if val.heights is not None and (warning := entangled(val.heights, unhealthy, val.patients)):
        lines.append(f"warning  {warning}")
    if alone >= model:
        nothing = (0.0,) * len(channels)
        weights["evidence"] = replace(intensity, weights=nothing + intensity.weights)
    return weights, alone < model, lines
