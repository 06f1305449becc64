"""Drawing a scene: anti-aliased shapes of one colour each on a light grey ground."""

import math
from collections.abc import Callable

import numpy as np

from heterodiff.simulators.shapes.scenes import Scene

RGB = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 30),
    "purple": (135, 45, 175),
    "orange": (245, 130, 20),
}
_COLOUR_SPREAD = 12
_GROUND = (215, 250)
_RADIUS = (0.11, 0.19)
_JITTER = 0.06
"""Largest shift of the centre of a single thing, as a share of height and width."""
_SIDES = {"top": 0.26, "left": 0.26, "bottom": 0.74, "right": 0.74}
_GAP = 0.07
"""Least distance between two things, as a share of the shorter side."""
_MARGIN = 0.02

Distance = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.sqrt(x * x + y * y) - radius


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return _box(x, y, 0.86 * radius, 0.86 * radius)


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Triangle with a level base at the bottom, ``2 radius`` wide and 0.9 times as high."""
    bottom, height = 0.9 * radius, 1.8 * radius
    slope = math.hypot(height, radius)
    sides = (height * np.abs(x) + radius * (y - bottom + height) * -1) / slope
    return np.maximum(sides, y - bottom)


def _cross(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.minimum(_box(x, y, radius, 0.32 * radius), _box(x, y, 0.32 * radius, radius))


_DISTANCE: dict[str, Distance] = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}
"""Pixels from a point (x to the right, y down, from the centre) to the outline, negative inside."""


def _single_centre(rng: np.random.RandomState, place: str, height: int, width: int) -> list[tuple[float, float]]:
    vertical, horizontal = place.split() if place != "centre" else ("", "")
    y, x = _SIDES.get(vertical, 0.5), _SIDES.get(horizontal, 0.5)
    down, right = rng.uniform(-_JITTER, _JITTER, 2)
    return [((y + down) * height, (x + right) * width)]


def _pair_centres(
    rng: np.random.RandomState, place: str, radii: np.ndarray, height: int, width: int
) -> list[tuple[float, float]]:
    """Centres (y, x) of two things one after the other along one axis, and nearly level across it."""
    along, across = (height, width) if place == "above" else (width, height)
    side, (first, second) = min(height, width), radii
    margin = _MARGIN * side
    distance = rng.uniform(first + second + _GAP * side, along - first - second - 2 * margin)
    start = rng.uniform(first + margin, along - margin - second - distance)
    level = rng.uniform(0.35, 0.65) * across
    shift, other_shift = rng.uniform(-0.05, 0.05, 2) * side
    centres = [(start, level + shift), (start + distance, level + other_shift)]
    return centres if place == "above" else [(y, x) for x, y in centres]


def render(scene: Scene, rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Draw ``scene``, whose place is known, at random positions and sizes that agree with it.

    Returns:
        (3, height, width) uint8, RGB.
    """
    assert scene.place is not None
    radii = rng.uniform(*_RADIUS, len(scene.things)) * min(height, width)
    if len(scene.things) == 1:
        centres = _single_centre(rng, scene.place, height, width)
    else:
        centres = _pair_centres(rng, scene.place, radii, height, width)
    image = np.full((3, height, width), rng.uniform(*_GROUND))
    for thing, radius, centre in zip(scene.things, radii, centres, strict=True):
        colour = np.array(RGB[thing.colour]) + rng.uniform(-_COLOUR_SPREAD, _COLOUR_SPREAD, 3)
        _paint(image, _DISTANCE[thing.shape], colour.clip(0, 255), radius, centre)
    return np.rint(image).astype(np.uint8)


def _paint(
    image: np.ndarray, distance: Distance, colour: np.ndarray, radius: float, centre: tuple[float, float]
) -> None:
    """Lay a shape over ``image`` (3, H, W), touching only the pixels around it."""
    rows, columns = (
        slice(max(0, int(middle - radius) - 1), min(size, int(middle + radius) + 2))
        for middle, size in zip(centre, image.shape[1:], strict=True)
    )
    y = np.arange(rows.start, rows.stop)[:, None] + 0.5 - centre[0]
    x = np.arange(columns.start, columns.stop)[None] + 0.5 - centre[1]
    covered = np.clip(0.5 - distance(x, y, radius), 0.0, 1.0)
    patch = image[:, rows, columns]
    patch += covered * (colour[:, None, None] - patch)
