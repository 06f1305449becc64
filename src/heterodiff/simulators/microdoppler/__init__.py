"""The built-in source ``microdoppler``: simulated radar spectrograms of six kinds of moving targets."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from heterodiff.config import DataConfig, MicrodopplerConfig
from heterodiff.data.collection import Collection
from heterodiff.simulators import drawn_size, random_state
from heterodiff.simulators.microdoppler.recording import (
    CLASSES,
    Facts,
    axes,
    draw_view,
    highest_doppler,
    observe,
    simulate,
)

__all__ = ["CLASSES", "Facts", "axes", "open_microdoppler", "random_state", "simulate"]

MIN_SIDE = 16


def _draw(config: MicrodopplerConfig, height: int, width: int, row: int) -> np.ndarray:
    index, picture = divmod(row, config.images_per_class)
    return simulate(CLASSES[index], random_state(config.seed, index, picture), config, height, width)[0][None]


def _columns(config: MicrodopplerConfig, wanted: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Speed in m/s, and aspect and elevation in degrees, of every picture, as far as they are ``wanted``."""
    if not wanted:
        return {}
    drawn = [
        draw_view(name, random_state(config.seed, number, picture), config)
        for number, name in enumerate(CLASSES)
        for picture in range(config.images_per_class)
    ]
    return {
        "speed_m_s": tuple(float(view.speed_m_s) for view, _, _ in drawn),
        "aspect_deg": tuple(float(aspect) for _, aspect, _ in drawn),
        "elevation_deg": tuple(float(elevation) for _, _, elevation in drawn),
    }


def _aliasing_warnings(settings: MicrodopplerConfig) -> tuple[str, ...]:
    if settings.prf_hz is None:
        return ()
    needed = {name: 2 * highest_doppler(name, settings) for name in CLASSES}
    short = ", ".join(f"{name} up to {prf:,.0f}" for name, prf in needed.items() if prf > settings.prf_hz)
    if not short:
        return ()
    return (
        f"data.microdoppler.prf_hz {settings.prf_hz:,.0f} is too low for the fastest parts, whose Doppler "
        f"is aliased; Hz needed: {short}; leave prf_hz out to choose it for each class",
    )


def open_microdoppler(config: DataConfig) -> Collection:
    """Return the pictures: float32 (6 * images_per_class, 1, H, W) in decibels, simulated when they are read.

    Their size is ``image_size``, by default 64 x 64.

    Raises:
        DataError: ``image_size`` below 16, ``channels`` other than 1, or a recording of too many samples.
    """
    height, width = drawn_size(config, MIN_SIDE, channels=1)
    settings = config.microdoppler
    for name in CLASSES:
        observe(name, settings, height, width)
    labelled = config.labels != "none"
    listed = [(name, index) for name in CLASSES for index in range(settings.images_per_class)]
    return Collection(
        where="microdoppler",
        names=tuple(f"{name}/{index:06d}" for name, index in listed),
        class_of=tuple(name if labelled else None for name, _ in listed),
        read=partial(_draw, settings, height, width),
        value_range=(-settings.dynamic_range_db, 0.0),
        warnings=_aliasing_warnings(settings),
        columns=_columns(settings, config.columns),
    )
