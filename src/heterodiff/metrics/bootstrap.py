"""Intervals of accuracies that were measured on the same images with the same seeds."""

import numpy as np

RESAMPLES = 5_000
CHUNK = 250  # resamples at once, which bounds memory


def crossed_bootstrap(hits: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resample images and, crossed with them, seeds; return the mean accuracies of every resample.

    Images and seeds are both drawn with replacement and both at once (the pigeonhole bootstrap of Owen 2007), and
    each resample is the same for all conditions. Differences and ratios of the columns of the result are therefore
    paired: what makes an image hard or a seed lucky drops out of them.

    Args:
        hits: (K, S, N), whether condition k with seed s read image n right.

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
    """How often each of ``size`` items was drawn in each resample, (resamples, size)."""
    drawn = generator.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of ``values`` (B,)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
