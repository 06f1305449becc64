"""One random head: its tissues in a slice, and their intensity in each of four MRI modalities.

Lengths are in units of half the shorter side of the picture, x to the right, y down, z from -1 to 1 along the slices.
"""

from dataclasses import dataclass

import numpy as np

MODALITIES = ("flair", "t1", "t1ce", "t2")
INTENSITY = {
    "air": (0.02, 0.02, 0.02, 0.02),
    "scalp": (0.42, 0.75, 0.78, 0.40),
    "skull": (0.08, 0.10, 0.10, 0.08),
    "fluid": (0.12, 0.15, 0.15, 0.95),
    "grey": (0.62, 0.48, 0.50, 0.60),
    "white": (0.46, 0.70, 0.72, 0.42),
    "lesion": (0.66, 0.50, 0.54, 0.63),
    "core": (0.56, 0.40, 0.42, 0.68),
    "rim": (0.65, 0.52, 0.95, 0.61),
}
"""Intensity of each tissue in each of :data:`MODALITIES`. On FLAIR and T2 a lesion is hardly brighter than grey matter:
only its position gives it away, so no threshold finds it."""
_TISSUE_SPREAD = 0.03
_SCALP, _SKULL, _FLUID, _CORTEX = 1.0, 0.95, 0.89, 0.86
"""Outer borders, as a share of the head's radius."""
_CORTEX_DEPTH = 0.12
_FOLDS = ((5, 0.020), (9, 0.025), (14, 0.025))
_LESION_PLACE = (0.15, 0.55)
_LESION_WAVES = ((2, 0.15), (3, 0.10), (5, 0.06))
_CORE, _RIM = 0.45, 0.65
"""Radii of core and rim within the lesion, as a share of its own."""


@dataclass(frozen=True)
class Waves:
    """A smooth random field over (x, y, z): a sum of plane waves of about unit amplitude."""

    frequency: np.ndarray
    phase: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.RandomState, highest: float, count: int = 4) -> "Waves":
        return cls(rng.uniform(-highest, highest, (count, 3)), rng.uniform(0, 2 * np.pi, count))

    def __call__(self, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
        angle = sum(f[:, None, None] * axis for f, axis in zip(self.frequency.T, (x, y, z), strict=True))
        return np.cos(np.pi * angle + self.phase[:, None, None]).sum(axis=0) / np.sqrt(len(self.phase) / 2)


@dataclass(frozen=True)
class Lesion:
    """Slices, position and size of a lesion.

    Attributes:
        first, count: slices that show it.
        place: share of the head's radius, and angle in radians, of its centre.
        radius: in its middle slice.
        phase: phases of its outline's waves.
    """

    first: int
    count: int
    place: tuple[float, float]
    radius: float
    phase: np.ndarray

    def radius_at(self, index: int) -> float:
        """Radius in slice ``index``, 0 where it does not reach."""
        if not self.first <= index < self.first + self.count:
            return 0.0
        from_middle = (index - self.first - (self.count - 1) / 2) / ((self.count + 1) / 2)
        return self.radius * float(np.sqrt(1 - from_middle**2))


@dataclass(frozen=True)
class Head:
    """Everything that is the same in all slices of a patient."""

    half_width: float
    half_height: float
    folds: np.ndarray
    shift: tuple[Waves, Waves]
    bend: float
    ventricle: tuple[float, float, float]
    nuclei: tuple[float, float]
    caps: float
    bias: tuple[Waves, ...]
    intensity: np.ndarray
    lesion: Lesion | None

    @classmethod
    def draw(
        cls, rng: np.random.RandomState, slices: int, unhealthy: float, lesion_radius: tuple[float, float]
    ) -> "Head":
        """Draw a patient of ``slices`` slices, of which about the share ``unhealthy`` show a lesion."""
        outlines = rng.uniform(0.70, 0.80), rng.uniform(0.84, 0.94)
        folds = rng.uniform(0, 2 * np.pi, (len(_FOLDS), 2))
        shift = Waves.draw(rng, 1.2), Waves.draw(rng, 1.2)
        bend = rng.uniform(0.01, 0.03)
        ventricle = rng.uniform(0.08, 0.13), rng.uniform(0.05, 0.10), rng.uniform(0.20, 0.34)
        nuclei = rng.uniform(0.25, 0.32), rng.uniform(0.09, 0.13)
        caps = rng.uniform(0, 0.16)
        bias = tuple(Waves.draw(rng, 0.6) for _ in MODALITIES)
        intensity = np.array(list(INTENSITY.values()))
        intensity = intensity + rng.normal(0, _TISSUE_SPREAD, intensity.shape)
        lesion = _draw_lesion(rng, slices, unhealthy, lesion_radius)
        return cls(*outlines, folds, shift, bend, ventricle, nuclei, caps, bias, intensity, lesion)

    def has_lesion(self, index: int) -> bool:
        """Return True if slice ``index`` shows a lesion."""
        return self.lesion is not None and self.lesion.radius_at(index) > 0


def _draw_lesion(
    rng: np.random.RandomState, slices: int, unhealthy: float, radius: tuple[float, float]
) -> Lesion | None:
    share = np.clip(unhealthy * rng.uniform(0.4, 1.6), 0, 1)
    count = int(share * slices + rng.uniform())
    first = rng.randint(slices - count + 1)
    place = rng.uniform(*_LESION_PLACE), rng.uniform(0, 2 * np.pi)
    size, phase = rng.uniform(*radius), rng.uniform(0, 2 * np.pi, len(_LESION_WAVES))
    return Lesion(first, count, place, size, phase) if count else None


def _ellipse(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float, tilt: float = 0.0) -> np.ndarray:
    """Approximate distance from the outline, negative inside."""
    x, y = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    return (np.sqrt((x / half_width) ** 2 + (y / half_height) ** 2) - 1) * min(half_width, half_height)


def _layers(
    head: Head, index: int, z: float, x: np.ndarray, y: np.ndarray
) -> tuple[list[tuple[str, np.ndarray]], np.ndarray]:
    """Tissues from the outermost to the one on top with distances from their outlines, and those of the caps."""
    across, along = head.shift[0](x, y, z), head.shift[1](x, y, z)
    x, y = x + head.bend * across, y + head.bend * along
    size = np.sqrt(1 - 0.55 * z * z)
    width, height = head.half_width * size, head.half_height * size
    radius, angle = np.sqrt((x / width) ** 2 + (y / height) ** 2), np.arctan2(y, x)
    border = np.full_like(radius, _CORTEX - _CORTEX_DEPTH)
    for (waves, depth), (phase, turn) in zip(_FOLDS, head.folds, strict=True):
        border += depth * np.sin(waves * angle + phase + 3 * turn * z)
    scale = min(width, height)
    layers = [
        ("scalp", (radius - _SCALP) * scale),
        ("skull", (radius - _SKULL) * scale),
        ("fluid", (radius - _FLUID) * scale),
        ("grey", (radius - _CORTEX) * scale),
        ("white", (radius - border) * scale),
    ]
    apart, half_width, half_height = head.ventricle
    shrink = np.sqrt(max(0.0, 1 - (z / 0.75) ** 2))
    far, thick = head.nuclei
    caps = np.full_like(radius, np.inf)
    for side in (-1, 1):
        layers.append(("grey", _ellipse(x - side * far * size, y - 0.05, thick, 1.7 * thick, side * 0.3)))
        if shrink > 0.2:
            outline = _ellipse(x - side * apart, y + 0.03, half_width * shrink, half_height * shrink, side * 0.35)
            layers.append(("fluid", outline))
            caps = np.minimum(caps, outline)
    if head.lesion is not None and (reach := head.lesion.radius_at(index)):
        share, turn = head.lesion.place
        from_x, from_y = x - share * width * np.cos(turn), y - share * height * np.sin(turn)
        around = np.arctan2(from_y, from_x)
        uneven = np.ones_like(around)
        for (number, depth), phase in zip(_LESION_WAVES, head.lesion.phase, strict=True):
            uneven += depth * np.sin(number * around + phase)
        distance = np.sqrt(from_x**2 + from_y**2)
        inside = np.maximum(distance / uneven - reach, (radius - _CORTEX) * scale)
        layers += [("lesion", inside)]
        layers += [("rim", distance / uneven - _RIM * reach), ("core", distance / uneven - _CORE * reach)]
    return layers, caps


def render(
    head: Head,
    index: int,
    z: float,
    rng: np.random.RandomState,
    shape: tuple[int, int],
    *,
    contrast: float,
    bias: float,
    noise: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw slice ``index`` at height ``z``.

    Args:
        rng: generator of the noise alone.
        shape: (H, W).
        contrast: contrast of a lesion against white matter; 1 as in :data:`INTENSITY`.
        bias: strength of the field that brightens one side of each modality.
        noise: std in each of the two parts of the complex signal.

    Returns:
        (4, H, W) float32, 0 or more, and the lesion's mask (H, W) bool.
    """
    half = min(shape) / 2
    y, x = ((np.arange(side) + 0.5 - side / 2) / half for side in shape)
    x, y = np.meshgrid(x, y)
    names = list(INTENSITY)
    tissue = dict(zip(names, head.intensity, strict=True))
    for name in ("lesion", "core", "rim"):
        tissue[name] = tissue["white"] + contrast * (tissue[name] - tissue["white"])
    layers, caps = _layers(head, index, z, x, y)
    image = np.broadcast_to(tissue["air"][:, None, None], (len(MODALITIES), *shape)).copy()
    mask = np.zeros(shape, dtype=bool)
    for name, distance in layers:
        cover = np.clip(0.5 - distance * half, 0, 1)
        image += cover * (tissue[name][:, None, None] - image)
        if name == "lesion":
            mask = cover >= 0.5
    bright = head.caps * np.exp(-np.clip(caps, 0, None) / 0.04) * (caps > 0) * ~mask
    image[MODALITIES.index("flair")] += bright
    image *= np.stack([1 + bias * field(x, y, z) for field in head.bias])
    real, imaginary = rng.normal(0, noise, (2, *image.shape))
    return np.sqrt((image + real) ** 2 + imaginary**2).astype(np.float32), mask
