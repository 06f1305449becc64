"""The built-in source ``microdoppler``: simulated radar spectrograms of six kinds of moving targets."""

from dataclasses import dataclass

import numpy as np

from heterodiff.config import DataConfig, MicrodopplerConfig
from heterodiff.data.collection import Collection
from heterodiff.errors import DataError
from heterodiff.simulators.microdoppler.recording import CLASSES, Facts, axes, highest_doppler, observe, simulate

__all__ = ["CLASSES", "Facts", "MicrodopplerReader", "axes", "open_microdoppler", "random_state", "simulate"]

DEFAULT_SIZE = (64, 64)
MIN_SIDE = 16


def random_state(seed: int, class_index: int, picture: int) -> np.random.RandomState:
    """Return the random numbers of one picture, which depend on nothing else.

    ``RandomState`` because NumPy promises never to change its stream; that of ``default_rng`` may change.
    """
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, class_index, picture])


@dataclass(frozen=True)
class MicrodopplerReader:
    """Simulate row ``i``: picture ``i % images_per_class`` of class ``i // images_per_class``."""

    config: MicrodopplerConfig
    height: int
    width: int

    def __call__(self, row: int) -> np.ndarray:
        index, picture = divmod(row, self.config.images_per_class)
        rng = random_state(self.config.seed, index, picture)
        return simulate(CLASSES[index], rng, self.config, self.height, self.width)[0][None]


def _warnings(config: DataConfig) -> list[str]:
    settings = config.microdoppler
    warnings = ["data.path is not used by data.source 'microdoppler'"] if config.path else []
    if settings.prf_hz is not None:
        needed = {name: 2 * highest_doppler(name, settings) for name in CLASSES}
        short = {name: prf for name, prf in needed.items() if prf > settings.prf_hz}
        if short:
            listed = ", ".join(f"{name} up to {prf:,.0f}" for name, prf in short.items())
            warnings.append(
                f"data.microdoppler.prf_hz {settings.prf_hz:,.0f} is too low for the fastest parts, whose Doppler "
                f"folds over: Hz needed: {listed}; leave prf_hz out for a fitting one per class"
            )
    return warnings


def open_microdoppler(config: DataConfig) -> Collection:
    """Return the pictures: float32 (6 * images_per_class, 1, H, W) in decibels, simulated when they are read.

    Their size is ``image_size``, by default 64 x 64.

    Raises:
        DataError: ``image_size`` below 16, ``channels`` other than 1, or a recording of too many samples.
    """
    height, width = config.image_size or DEFAULT_SIZE
    if min(height, width) < MIN_SIDE:
        raise DataError(
            f"data.image_size: 'microdoppler' expects at least {MIN_SIDE}, found [{height}, {width}]; "
            f"set it to [{max(height, MIN_SIDE)}, {max(width, MIN_SIDE)}] or more"
        )
    if config.channels not in (None, 1):
        raise DataError(f"data.channels: 'microdoppler' has 1, found {config.channels}; leave it out")
    settings = config.microdoppler
    for name in CLASSES:
        observe(name, settings, height, width)
    labelled = config.labels != "none"
    listed = [(name, index) for name in CLASSES for index in range(settings.images_per_class)]
    return Collection(
        where="microdoppler",
        names=tuple(f"{name}/{index:06d}" for name, index in listed),
        class_of=tuple(name if labelled else None for name, _ in listed),
        read=MicrodopplerReader(settings, height, width),
        value_range=(-settings.dynamic_range_db, 0.0),
        warnings=tuple(_warnings(config)),
    )
