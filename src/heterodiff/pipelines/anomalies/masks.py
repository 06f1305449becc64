"""Masks and image decisions from anomaly maps, calibrated with image labels alone.

``maps`` of one image are (C, H, W); ``smoothing`` is the side of a filter in pixels.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from heterodiff.errors import DataError, RunError
from heterodiff.pipelines.anomalies.label_weights import LabelWeights

CANDIDATES = 100
QUANTILES = (0.905, 0.995)
"""Quantiles of the healthy validation scores that are searched for the threshold."""
HEALTHY_QUANTILE = 0.95
"""Quantile of the healthy scores that is the threshold if there are no others: one image of twenty is a false alarm."""
SMOOTHING = 5
MIN_COMPONENT, AT_SIDE = 40, 128
"""Components up to this number of pixels of a 128x128 image are dropped; up to the same share of other images."""


@dataclass(frozen=True)
class Calibration:
    """Parameters of masks and decisions, learned from validation images without pixel labels.

    Attributes:
        largest_divergence: maximum of each channel among unhealthy images; if there are none, among healthy ones.
        score_limit: threshold; images of at least this score are judged unhealthy.
        healthy, unhealthy: number of images of each label.
        errors: number of these images that are judged wrongly.
        evidence: weights of label differences and intensities, of method label-difference.
        intensity: weights of intensities alone, to compare with.
        channel: which of the channels compared weighs most, and is shown in pictures.
        network: digest of the segmentation network's weights if masks and scores are its; else None.
    """

    largest_divergence: tuple[float, ...]
    score_limit: float
    healthy: int
    unhealthy: int
    errors: int
    evidence: LabelWeights | None = None
    intensity: LabelWeights | None = None
    channel: int = 0
    network: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any, channels: int | None = None) -> "Calibration":
        """Read what :meth:`to_dict` wrote.

        Args:
            channels: expected number of channels; default: any.

        Raises:
            RunError: missing keys, values of the wrong type or not finite, or another number of channels.
        """
        try:
            largest = tuple(float(value) for value in content["largest_divergence"])
            threshold = float(content["score_limit"])
            healthy, unhealthy, errors = (int(content[key]) for key in ("healthy", "unhealthy", "errors"))
            channel = int(content.get("channel", 0))
            planes = {"evidence": len(largest) * 2, "intensity": len(largest)}
            weights = {
                key: LabelWeights.from_dict(content[key], count)
                for key, count in planes.items()
                if content.get(key) is not None
            }
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunError(f"saved calibration cannot be used ({error!r}); calibrate again") from None
        if not np.isfinite([*largest, threshold]).all():
            raise RunError(
                f"saved calibration: expected finite thresholds, found {[*largest, threshold]}; calibrate again"
            )
        if not 0 <= channel < max(1, len(largest)):
            raise RunError(
                f"saved calibration: expected a channel below {len(largest)}, found {channel}; calibrate again"
            )
        if channels is not None and len(largest) != channels:
            raise RunError(f"saved calibration: expected {channels} channels, found {len(largest)}; calibrate again")
        network = None if content.get("network") is None else str(content["network"])
        return cls(largest, threshold, healthy, unhealthy, errors, **weights, channel=channel, network=network)


def calibrate(
    divergence: np.ndarray,
    score: np.ndarray,
    unhealthy: np.ndarray,
    healthy_alone: bool = False,
) -> Calibration:
    """Learn from validation images and their labels, as Che et al. 2025 do.

    Args:
        divergence: (N, C), see :class:`heterodiff.diffusion.anomaly.AnomalyMaps`.
        score: (N,).
        unhealthy: (N,) bool.
        healthy_alone: accept healthy images alone; the threshold is then the 95th percentile of their scores.

    Raises:
        DataError: a label is missing; scores or divergences that are not finite; a mean score of unhealthy images
            below that of healthy ones, as if the labels were swapped; or a threshold that no unhealthy image reaches.
    """
    count = int(unhealthy.sum())
    if not (count > 0 or healthy_alone) or count == len(unhealthy):
        raise DataError(
            f"calibration needs healthy and unhealthy validation images, found {len(unhealthy) - count} and {count}; "
            "hold out more (data.val_fraction)"
        )
    if not (np.isfinite(score).all() and np.isfinite(divergence).all()):
        raise DataError(
            "calibration: the model gives scores that are not finite; train it longer or lower the guidance"
        )
    if count and (mean := score[unhealthy].mean()) < (healthy_mean := score[~unhealthy].mean()):
        raise DataError(
            f"calibration: unhealthy validation images score {mean:.4g} on average, less than healthy ones with "
            f"{healthy_mean:.4g}; either the labels are swapped (0 is healthy), or the model has not learned to tell "
            "them apart: train it longer"
        )
    quantiles = np.linspace(*QUANTILES, CANDIDATES) if count else [HEALTHY_QUANTILE]
    candidates = np.quantile(score[~unhealthy], quantiles)
    errors = ((score[None] >= candidates[:, None]) != unhealthy[None]).sum(axis=1)
    best = int(errors.argmin())
    largest = tuple(map(float, divergence[unhealthy if count else ~unhealthy].max(axis=0)))
    if count and not (score[unhealthy] >= candidates[best]).any():
        raise DataError(
            f"calibration: every image would be judged healthy, as no unhealthy validation image scores above the "
            f"healthy ones (threshold {candidates[best]:.4g}); the model has not learned to tell them apart: train it "
            "longer, or look at data.image_size and segmentation.smoothing if lesions are small"
        )
    return Calibration(largest, float(candidates[best]), len(unhealthy) - count, count, int(errors[best]))


def smoothed_map(maps: np.ndarray, threshold: str, smoothing: int = SMOOTHING) -> np.ndarray:
    """Return the mean (H, W) of the channels' maps, smoothed for masks.

    Args:
        threshold: ``quantile`` for a median filter, ``half-peak`` for a mean filter.
    """
    from scipy.ndimage import median_filter, uniform_filter

    smooth = median_filter if threshold == "quantile" else uniform_filter
    return np.asarray(smooth(maps.mean(axis=0), smoothing))


def anomaly_mask(
    maps: np.ndarray, divergence: np.ndarray, largest_divergence: np.ndarray, smoothing: int = SMOOTHING
) -> np.ndarray:
    """Return the mask (H, W) bool of one image before components are dropped.

    The threshold of the smoothed map is the mean over the channels of the quantile 0.98 - 0.08 D / Dmax of the
    channel's map, D / Dmax rounded to hundredths: the stronger the anomaly, the more is marked.

    Args:
        divergence, largest_divergence: D and Dmax, (C,).
    """
    share = np.clip(
        np.divide(divergence, largest_divergence, where=largest_divergence > 0, out=np.ones(len(maps))), 0, 1
    )
    quantiles = 0.98 - 0.0008 * np.round(100 * share)
    threshold = np.mean([np.quantile(one, q) for one, q in zip(maps, quantiles, strict=True)])
    smooth = smoothed_map(maps, "quantile", smoothing)
    return (smooth >= threshold) & (smooth > 0)  # a map that is zero at its quantile would be marked everywhere


def peak_score(maps: np.ndarray, smoothing: int = SMOOTHING) -> float:
    """Return the peak of the smoothed map over its mean, which does not depend on the noise of the image.

    It is at least about 1, and 0 for a map that is 0 everywhere.
    """
    mean = float(maps.mean())
    return float(smoothed_map(maps, "half-peak", smoothing).max()) / mean if mean != 0 else 0.0


def half_peak_mask(maps: np.ndarray, smoothing: int = SMOOTHING) -> np.ndarray:
    """Return the mask (H, W) bool of one image before components are dropped: its smoothed map from half its peak up.

    It marks something in every image; another score, as :func:`peak_score`, decides which images are unhealthy.
    """
    smooth = smoothed_map(maps, "half-peak", smoothing)
    return (smooth >= smooth.max() / 2) & (smooth > 0)


def small_area(shape: tuple[int, int], least: int | None = None) -> int:
    """Return ``least``, or by default 40 pixels of 128x128 and the same share of another ``shape``."""
    return round(MIN_COMPONENT * shape[0] * shape[1] / AT_SIDE**2) if least is None else least


def drop_small(mask: np.ndarray, least: int | None = None) -> np.ndarray:
    """Return ``mask`` (H, W) without components, joined by edge or corner, of at most ``least`` pixels.

    Args:
        least: see :func:`small_area`.
    """
    from scipy.ndimage import label

    parts, count = label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    kept = sizes > small_area(mask.shape, least)
    kept[0] = False
    return kept[parts]
