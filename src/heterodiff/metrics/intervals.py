"""Confidence intervals at 95 %: Wilson's, and the bootstrap of images that are classified with several seeds."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 5_000
CHUNK = 250  # resamples at once, which bounds memory


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval (Wilson 1927) of a share; 95 % by default, (0, 1) without data.

    ``successes`` is a count, or the mean count over repeated measurements of the same ``count`` items.
    """
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # The ends are exact where nothing or everything succeeded; rounding would leave 0.9999999.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == count else centre + half


def wilson_share(successes: float, count: int, name: str = "share") -> dict[str, Any]:
    """``{n, share, low, high}`` with Wilson's interval; the share is None for n = 0, and its key is ``name``."""
    low, high = wilson_interval(successes, count)
    return {"n": count, name: successes / count if count else None, "low": low, "high": high}


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of ``values`` (B,)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def crossed_bootstrap(hits: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resample images and, crossed with them, seeds; return the mean accuracies of every resample.

    Images and seeds are both drawn with replacement and both at once (the pigeonhole bootstrap of Owen 2007), and
    each resample is the same for all conditions. Differences and ratios of the columns of the result are therefore
    paired: what makes an image hard or a seed lucky drops out of them.

    Args:
        hits: (K, S, N), whether condition k with seed s classified image n correctly.

    Returns:
        (resamples, K), shares.
    """
    conditions, seeds, images = hits.shape
    flat = hits.reshape(conditions * seeds, images).T.astype(np.float64)
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        image_counts, seed_counts = (_counts(generator, count, size) for size in (images, seeds))
        sums = (image_counts @ flat).reshape(count, conditions, seeds)
        parts.append((sums * seed_counts[:, None, :]).sum(axis=2))
    # Whole numbers up to here, so that resamples that agree are equal to the last bit.
    return np.concatenate(parts) / (seeds * images)


def _counts(generator: np.random.Generator, resamples: int, size: int) -> np.ndarray:
    """Number of times that each of ``size`` items was drawn in each resample, (resamples, size)."""
    drawn = generator.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size)


def seed_words(seed: int) -> tuple[int, int]:
    """A seed of 64 bits as two numbers below 2^32, which numpy takes."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def proportion(hits: Sequence[bool], seed: int) -> dict[str, Any]:
    """``{n, share, low, high}`` of ``hits`` with a bootstrap interval.

    Where all hits are alike, no resample differs from them, so that the interval is Wilson's instead.
    """
    values = np.array(hits, dtype=bool)
    found = wilson_share(int(values.sum()), len(values))
    if 0 < values.sum() < len(values):
        resampled = crossed_bootstrap(values[None, None], seed=seed_words(seed)[0])
        found["low"], found["high"] = percentile_interval(resampled[:, 0])
    return found
