"""The patients that a run knows, so that others whose channels are scaled or ordered differently are noticed."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from heterodiff.errors import RunError
from heterodiff.files import replacing
from heterodiff.pipelines.anomalies.label_weights import FOREGROUND

SIDE = 32
QUANTILES = (0.1, 0.5, 0.9)
ROOM = 0.5
"""Room that another patient's quantiles have beyond those seen, as a share of their range."""
MARGIN = 0.3
"""Sum of correlations over the channels by which another order must be better to be reported."""
MOST_CHANNELS = 6
"""Channels of which every order is tried; of more, scales alone are compared."""


@dataclass(frozen=True)
class KnownPatients:
    """Facts about channels, over the patients that a run was trained on.

    Attributes:
        mean: (C, 32, 32) mean image.
        low, high: (C, 3) least and greatest 10 %, 50 % and 90 % quantile of a patient's foreground.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, patients: Sequence[np.ndarray]) -> "KnownPatients":
        """Describe patients, each (slices, C, H, W) in [0, 1]; at least one."""
        quantiles = np.stack([_quantiles(images) for images in patients])
        return cls(np.mean([_mean_image(images) for images in patients], axis=0), quantiles.min(0), quantiles.max(0))

    def save(self, path: Path) -> None:
        """Write an npz file."""
        with replacing(path) as file:
            np.savez(file, mean=self.mean, low=self.low, high=self.high)

    @classmethod
    def load(cls, path: Path) -> "KnownPatients | None":
        """Read what :meth:`save` wrote; None where there is no file. Raises RunError if it is damaged."""
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                mean, low, high = (np.asarray(found[key], np.float64) for key in ("mean", "low", "high"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RunError(f"{path}: cannot be read ({error}); calibrate again") from None
        channels = len(mean) if mean.ndim == 3 else 0
        if mean.shape != (channels, SIDE, SIDE) or not low.shape == high.shape == (channels, len(QUANTILES)):
            raise RunError(f"{path}: arrays of unexpected shapes; calibrate again")
        return cls(mean, low, high)

    def differences(self, images: np.ndarray, names: Sequence[str]) -> list[str]:
        """Say in what a patient's channels differ from those known.

        Args:
            images: (slices, C, H, W) in [0, 1].
            names: of the channels.
        """
        lines = []
        order = self._order(images)
        for channel in np.flatnonzero(order != np.arange(len(order))).tolist():
            lines.append(
                f"'{names[channel]}' looks like '{names[order[channel]]}' of the patients trained on: check the order "
                "of the sequences"
            )
        found, room = _quantiles(images), ROOM * (self.high - self.low) + 0.01
        beyond = (found < self.low - room) | (found > self.high + room)
        for channel in np.flatnonzero(beyond.any(axis=1)).tolist():
            which = int(np.flatnonzero(beyond[channel])[0])
            low, high = self.low[channel, which], self.high[channel, which]
            lines.append(
                f"'{names[channel]}': {100 * QUANTILES[which]:.0f} % of the foreground are below "
                f"{found[channel, which]:.2f}; among the patients trained on, below {low:.2f} to {high:.2f}: another "
                "scale or scanner"
            )
        return lines

    def _order(self, images: np.ndarray) -> np.ndarray:
        """The channels of the known patients that a patient's channels look like, one each."""
        count = len(self.mean)
        same = tuple(range(count))
        if not 2 <= count <= MOST_CHANNELS:
            return np.array(same)
        alike = np.corrcoef(_contrast(_mean_image(images)), _contrast(self.mean))[:count, count:]
        sums = {order: sum(alike[k, order[k]] for k in same) for order in permutations(same)}
        best = max(sums, key=lambda order: sums[order])
        return np.array(best if sums[best] > sums[same] + MARGIN else same)


def _mean_image(images: np.ndarray) -> np.ndarray:
    mean = torch.from_numpy(np.ascontiguousarray(images.mean(axis=0)))[None].double()
    return functional.interpolate(mean, size=(SIDE, SIDE), mode="area")[0].numpy()


def _contrast(mean: np.ndarray) -> np.ndarray:
    """In what each channel differs from the mean of all, (C, pixels), with a little noise against constant rows."""
    noise = 1e-6 * np.random.default_rng(0).normal(size=mean.shape)
    return (mean - mean.mean(axis=0) + noise).reshape(len(mean), -1)


def _quantiles(images: np.ndarray) -> np.ndarray:
    foreground = images.mean(axis=1) > FOREGROUND
    if not foreground.any():
        return np.zeros((images.shape[1], len(QUANTILES)))
    return np.stack([np.quantile(images[:, c][foreground], QUANTILES) for c in range(images.shape[1])])
