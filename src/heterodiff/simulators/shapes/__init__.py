"""The built-in source ``shapes``: drawn pictures of one or two coloured shapes, with true captions."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from heterodiff.config import DataConfig, ShapesConfig
from heterodiff.data.collection import Collection
from heterodiff.simulators import drawn_size, random_state
from heterodiff.simulators.shapes.drawing import render
from heterodiff.simulators.shapes.scenes import Scene, draw_scene, unseen_things
from heterodiff.simulators.shapes.words import captions_of

MIN_SIDE = 16
_CONTENT, _DRAWING = range(2)
"""Last number of a picture's random states: for scene and captions, and for the drawing, whatever its size."""


def scene_of(config: ShapesConfig, picture: int) -> Scene:
    """Return the scene that picture number ``picture`` shows, whatever its size.

    Raises:
        DataError: ``config.unseen`` cannot be used.
    """
    return draw_scene(random_state(config.seed, picture, _CONTENT), config.pairs, unseen_things(config))


def _captions(config: ShapesConfig) -> Iterator[tuple[str, ...]]:
    unseen = unseen_things(config)
    for picture in range(config.images):
        rng = random_state(config.seed, picture, _CONTENT)
        yield captions_of(draw_scene(rng, config.pairs, unseen), rng)


def _draw(config: ShapesConfig, height: int, width: int, picture: int) -> np.ndarray:
    return render(scene_of(config, picture), random_state(config.seed, picture, _DRAWING), height, width)


def open_shapes(config: DataConfig) -> Collection:
    """Return the pictures: uint8 (``shapes.images``, 3, H, W), drawn when they are read, and captions of each.

    Their size is ``image_size``, by default 64 x 64.

    Raises:
        DataError: ``image_size`` below 16, ``channels`` other than 3, or ``shapes.unseen`` that cannot be used.
    """
    settings = config.shapes
    return Collection(
        where="shapes",
        names=tuple(f"{picture:07d}" for picture in range(settings.images)),
        class_of=(None,) * settings.images,
        read=partial(_draw, settings, *drawn_size(config, MIN_SIDE, 3)),
        value_range=(0.0, 255.0),
        captions=tuple(_captions(settings)),
    )
