"""Overlap of predicted with true masks, decisions for whole images, and an intensity threshold as baseline."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from heterodiff.metrics.intervals import percentile_interval

SMOOTHING = 1e-6
RESAMPLES = 2_000
THRESHOLDS = 50
MOST_PIXELS = 50_000_000
SIZES = ("small", "medium", "large")


def overlap(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and IoU (N,) of masks (N, H, W) bool, each smoothed by 1e-6, so that two empty masks score 1."""
    both = (found & truth).sum(axis=(1, 2))
    total = found.sum(axis=(1, 2)) + truth.sum(axis=(1, 2))
    dice = (2 * both + SMOOTHING) / (total + SMOOTHING)
    return dice, (both + SMOOTHING) / (total - both + SMOOTHING)


def patient_interval(values: np.ndarray, patients: Sequence[str] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` (N,) from 2,000 resamples of patients, whose slices are alike."""
    _, of = np.unique(np.asarray(patients), return_inverse=True)
    sums, counts = np.bincount(of, values), np.bincount(of)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)
    return percentile_interval((drawn @ sums) / (drawn @ counts))


def mean_and_interval(values: np.ndarray, patients: np.ndarray) -> dict[str, Any]:
    """Return the mean of ``values`` (N,), its interval over patients, and their number."""
    if len(values) == 0:
        return {"n": 0}
    low, high = patient_interval(values, patients)
    return {"mean": float(values.mean()), "low": low, "high": high, "n": len(values)}


def _overlaps(
    found: np.ndarray, truth: np.ndarray, maps: np.ndarray, foreground: np.ndarray, patients: np.ndarray
) -> dict[str, Any]:
    dice, iou = overlap(found, truth)
    result: dict[str, Any] = {"dice": mean_and_interval(dice, patients), "iou": mean_and_interval(iou, patients)}
    if (area := precision_recall_area(truth, maps, foreground)) is not None:
        result["auprc"] = area
    return result


def precision_recall_area(truth: np.ndarray, values: np.ndarray, foreground: np.ndarray) -> float | None:
    """AUPRC over the foreground's pixels; over evenly spread images where all have more than fifty million pixels."""
    every = truth.size // MOST_PIXELS + 1
    truth, values = (part[::every][foreground[::every]] for part in (truth, values))
    return float(average_precision_score(truth, values)) if truth.any() else None


def threshold_baseline(
    images: np.ndarray,
    truth: np.ndarray,
    foreground: np.ndarray,
    drop_small: Callable[[np.ndarray], np.ndarray],
    smoothing: int = 5,
) -> dict[str, Any]:
    """Return the best Dice of an intensity threshold, which is chosen on the true masks themselves, in its favour.

    Foreground pixels above or below a threshold are marked, in one channel or in the mean of all, with or without
    smoothing.

    Args:
        images: (N, C, H, W) in [0, 1], all with a lesion.
        truth, foreground: (N, H, W) bool.
        drop_small: drops small components of a mask (H, W), as was done with the masks to compare with.
        smoothing: side in pixels of the square of the moving average.

    Returns:
        ``dice``, ``of`` (in words), ``threshold`` in [0, 1], ``auprc`` of the same values, and the Dice of ``each``
        image (N,).
    """
    from scipy.ndimage import uniform_filter

    channels = {f"channel {channel}": images[:, channel] for channel in range(images.shape[1])}
    if len(channels) > 1:
        channels["mean of channels"] = images.mean(axis=1)
    nothing = np.zeros(len(images))
    best: dict[str, Any] = {"dice": 0.0, "of": "", "threshold": 0.0, "auprc": None, "each": nothing}
    for name, plain in channels.items():
        smooth = uniform_filter(plain, (1, smoothing, smoothing))
        for of, values in ((name, plain), (f"{name}, smoothed", smooth)):
            for sign, side in ((1, "above"), (-1, "below")):
                for threshold in np.linspace(0, 1, THRESHOLDS, endpoint=False):
                    marked = (sign * values > sign * threshold) & foreground
                    each = overlap(np.stack([drop_small(one) for one in marked]), truth)[0]
                    if (dice := float(each.mean())) > best["dice"]:
                        area = precision_recall_area(truth, sign * values, foreground)
                        best = {"dice": dice, "of": f"{of}, {side}", "threshold": float(threshold), "auprc": area}
                        best["each"] = each
    return best


def _by_size(dice: np.ndarray, area: np.ndarray, patients: np.ndarray) -> list[dict[str, Any]]:
    """Dice of the smallest, middle and largest third of the lesions."""
    third = np.searchsorted(np.quantile(area, [1 / 3, 2 / 3]), area, side="left")
    return [
        {
            "size": name,
            "pixels": [int(area[third == k].min()), int(area[third == k].max())],
            "dice": mean_and_interval(dice[third == k], patients[third == k]),
        }
        for k, name in enumerate(SIZES)
        if (third == k).any()
    ]


def evaluate_segmentation(
    masks: np.ndarray,
    unhealthy: np.ndarray,
    maps: np.ndarray,
    score: np.ndarray,
    truth: np.ndarray,
    foreground: np.ndarray,
    patients: Sequence[str],
    ill: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compare predicted with true masks.

    Args:
        masks: (N, H, W) bool, before images judged healthy are emptied.
        unhealthy: (N,) bool, decision for each image.
        maps: (N, H, W), smoothed as for masks.
        score: (N,), higher for more anomalous images.
        truth, foreground: (N, H, W) bool; the foreground's pixels count for AUPRC.
        patients: patient of each image; intervals resample them.
        ill: (N,) bool, the label of each image; default: its true mask has any pixel.

    Returns:
        Ready for JSON: ``mixed`` (all images; masks of those judged healthy are empty) and ``unhealthy`` (those with a
        lesion, masks as they are), each with ``dice``, ``iou``, ``auprc``; ``patients``; ``sizes``; ``image``
        (``auroc``, ``precision``, ``recall``, ``accuracy``); ``healthy`` (``false_positive_area``).
    """
    of = np.asarray(patients)
    shown = np.asarray(truth.any(axis=(1, 2)))  # a lesion of few pixels may be lost where images are made smaller
    ill = shown if ill is None else ill
    mixed = masks & unhealthy[:, None, None]
    result: dict[str, Any] = {
        "n": len(truth),
        "mixed": _overlaps(mixed, truth, maps, foreground, of),
        "unhealthy": _overlaps(masks[shown], truth[shown], maps[shown], foreground[shown], of[shown]),
        "healthy": {"false_positive_area": mean_and_interval(mixed[~ill].mean(axis=(1, 2)), of[~ill])},
        "image": _decisions(unhealthy, score, ill),
    }
    dice = overlap(masks, truth)[0]
    if shown.any():
        result["sizes"] = _by_size(dice[shown], truth[shown].sum(axis=(1, 2)), of[shown])
    result["patients"] = [
        {"patient": str(patient), "n": int(chosen.sum()), "dice": float(dice[chosen].mean()) if chosen.any() else None}
        for patient in np.unique(of)
        for chosen in [(of == patient) & shown]
    ]
    return result


def _decisions(unhealthy: np.ndarray, score: np.ndarray, ill: np.ndarray) -> dict[str, Any]:
    right = int((unhealthy & ill).sum())
    return {
        "auroc": float(roc_auc_score(ill, score)) if 0 < ill.sum() < len(ill) else None,
        "precision": right / int(unhealthy.sum()) if unhealthy.any() else None,
        "recall": right / int(ill.sum()) if ill.any() else None,
        "accuracy": float((unhealthy == ill).mean()),
        "healthy": int((~ill).sum()),
        "unhealthy": int(ill.sum()),
    }
