"""From anomaly maps to masks and to a decision for the image, with what was learned from image labels alone."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from heterodiff.errors import DataError, RunError

CANDIDATES = 100
QUANTILES = (0.905, 0.995)
"""Of the scores of healthy validation images, between which the limit of an image's score is looked for."""
HEALTHY_QUANTILE = 0.95
"""Of the scores of healthy validation images, the limit where there are no others: one of twenty is a false alarm."""
SMOOTHING = 5
MIN_COMPONENT, AT_SIDE = 40, 128
"""Components of at most so many pixels of a picture of 128x128 are dropped; of the same share in others."""


@dataclass(frozen=True)
class Calibration:
    """What masks need to know of the validation images; no pixel label is in it.

    Attributes:
        largest_divergence: of each channel among unhealthy images; where there are none, among healthy ones.
        score_limit: images of at least this score are judged unhealthy.
        healthy, unhealthy: how many images of each label it was learned from.
        errors: how many of these it judges wrongly.
    """

    largest_divergence: tuple[float, ...]
    score_limit: float
    healthy: int
    unhealthy: int
    errors: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that :meth:`from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any, channels: int | None = None) -> "Calibration":
        """Read what :meth:`to_dict` wrote.

        Args:
            channels: how many are compared, where that is known.

        Raises:
            RunError: keys are missing, values have the wrong type or are not finite, or other channels.
        """
        try:
            largest = tuple(float(value) for value in content["largest_divergence"])
            limit = float(content["score_limit"])
            counts = [int(content[key]) for key in ("healthy", "unhealthy", "errors")]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunError(f"saved calibration cannot be used ({error!r}); calibrate again") from None
        if not np.isfinite([*largest, limit]).all():
            raise RunError(f"saved calibration: expected finite limits, found {[*largest, limit]}; calibrate again")
        if channels is not None and len(largest) != channels:
            raise RunError(f"saved calibration: expected {channels} channels, found {len(largest)}; calibrate again")
        return cls(largest, limit, *counts)


def calibrate(
    divergence: np.ndarray, score: np.ndarray, unhealthy: np.ndarray, healthy_alone: bool = False
) -> Calibration:
    """Learn from validation images and their labels, as Che et al. 2025 do.

    Args:
        divergence: (N, C), see :class:`heterodiff.diffusion.anomaly.AnomalyMaps`.
        score: (N,).
        unhealthy: (N,) bool.
        healthy_alone: whether healthy images do where there are no others: one of twenty is then judged unhealthy.

    Raises:
        DataError: one of the two labels is missing; scores or divergences that are not finite; or unhealthy images that
            score lower than healthy ones, as they do if the labels are the wrong way round.
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
    if count == 0:
        limit = float(np.quantile(score, HEALTHY_QUANTILE))
        return Calibration(tuple(map(float, divergence.max(axis=0))), limit, len(score), 0, int((score >= limit).sum()))
    means = score[unhealthy].mean(), score[~unhealthy].mean()
    if means[0] < means[1]:
        raise DataError(
            f"calibration: unhealthy validation images score {means[0]:.4g} on average, less than healthy ones with "
            f"{means[1]:.4g}; either the labels are the wrong way round (0 is healthy), or the model has not learned "
            "what tells them apart: train it longer"
        )
    candidates = np.quantile(score[~unhealthy], np.linspace(*QUANTILES, CANDIDATES))
    errors = ((score[None] >= candidates[:, None]) != unhealthy[None]).sum(axis=1)
    best = int(errors.argmin())
    largest = divergence[unhealthy].max(axis=0)
    return Calibration(
        tuple(map(float, largest)), float(candidates[best]), len(unhealthy) - count, count, int(errors[best])
    )


def smoothed_map(maps: np.ndarray, threshold: str, smoothing: int = SMOOTHING) -> np.ndarray:
    """Mean (H, W) of the channels' maps, each pixel from the square around it: what masks are marked in.

    Args:
        maps: (C, H, W).
        threshold: ``quantile``, for which the median of the square is taken, or ``half-peak``, for which its mean.
        smoothing: side of the square in pixels.
    """
    from scipy.ndimage import median_filter, uniform_filter

    smooth = {"quantile": median_filter, "half-peak": uniform_filter}[threshold]
    return np.asarray(smooth(maps.mean(axis=0), smoothing))


def anomaly_mask(
    maps: np.ndarray, divergence: np.ndarray, largest_divergence: np.ndarray, smoothing: int = SMOOTHING
) -> np.ndarray:
    """Return the mask (H, W) bool of one image before components are dropped.

    Of each channel the quantile 0.98 - 0.08 D / Dmax of its map, in hundredths of D / Dmax, is taken: the stronger the
    anomaly, the more is marked. Their mean is the limit of the smoothed map.

    Args:
        maps: (C, H, W).
        divergence, largest_divergence: (C,).
        smoothing: see :func:`smoothed_map`.
    """
    share = np.clip(
        np.divide(divergence, largest_divergence, where=largest_divergence > 0, out=np.ones(len(maps))), 0, 1
    )
    quantiles = 0.98 - 0.0008 * np.round(100 * share)
    limit = np.mean([np.quantile(one, q) for one, q in zip(maps, quantiles, strict=True)])
    smooth = smoothed_map(maps, "quantile", smoothing)
    return (smooth >= limit) & (smooth > 0)  # a map that is zero at its quantile would be marked everywhere


def peak_score(maps: np.ndarray, smoothing: int = SMOOTHING) -> float:
    """The peak of the smoothed map over the map's mean: how noisy an image or its map is does not count.

    Args:
        maps: (C, H, W).
        smoothing: side of the square that a pixel of the smoothed map is the mean of.

    Returns:
        At least about 1; 0 of a map that is 0 everywhere.
    """
    mean = float(maps.mean())
    return float(smoothed_map(maps, "half-peak", smoothing).max()) / mean if mean != 0 else 0.0


def half_peak_mask(maps: np.ndarray, smoothing: int = SMOOTHING) -> np.ndarray:
    """Return the mask (H, W) bool of one image before components are dropped: its smoothed map from half its peak on.

    Of every image it marks something; which images count is decided apart, as by :func:`peak_score`.

    Args:
        maps: (C, H, W).
        smoothing: see there.
    """
    smooth = smoothed_map(maps, "half-peak", smoothing)
    return (smooth >= smooth.max() / 2) & (smooth > 0)


def drop_small(mask: np.ndarray, least: int | None = None) -> np.ndarray:
    """Return ``mask`` (H, W) without components of at most ``least`` pixels, neighbours by edge or corner.

    Args:
        least: default 40 of 128x128, and the same share of other sizes.
    """
    from scipy.ndimage import label

    if least is None:
        least = round(MIN_COMPONENT * mask.size / AT_SIDE**2)
    parts, count = label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    kept = sizes > least
    kept[0] = False
    return kept[parts]
