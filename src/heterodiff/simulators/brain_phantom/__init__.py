"""The built-in source ``brain-phantom``: simulated heads in four MRI modalities, some slices with a lesion."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from heterodiff.config import BrainPhantomConfig, DataConfig
from heterodiff.data.collection import Collection
from heterodiff.errors import DataError
from heterodiff.simulators.brain_phantom.head import INTENSITY, MODALITIES, Head, render

__all__ = ["CLASSES", "INTENSITY", "MODALITIES", "PhantomRenderer", "head_of", "open_brain_phantom"]

CLASSES = ("healthy", "unhealthy")
DEFAULT_SIZE = (64, 64)
MIN_SIDE = 32
_REACH = 0.7
"""Of the slices, from the middle of the head, in units of its half height."""


@lru_cache(maxsize=1024)
def head_of(config: BrainPhantomConfig, patient: int) -> Head:
    """The head of a patient, which depends on seed, shares and patient number alone."""
    rng = np.random.RandomState([config.seed & 0xFFFFFFFF, config.seed >> 32, patient])
    return Head.draw(rng, config.slices_per_patient, config.unhealthy, config.lesion_radius)


@dataclass(frozen=True)
class PhantomRenderer:
    """Draw row ``i``: slice ``i % slices_per_patient`` of patient ``i // slices_per_patient``."""

    config: BrainPhantomConfig
    height: int
    width: int

    def _render(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        patient, index = divmod(row, config.slices_per_patient)
        rng = np.random.RandomState([config.seed & 0xFFFFFFFF, config.seed >> 32, patient, index])
        z = _REACH * (2 * (index + 0.5) / config.slices_per_patient - 1)
        return render(
            head_of(config, patient),
            index,
            z,
            rng,
            (self.height, self.width),
            contrast=config.contrast,
            bias=config.bias,
            noise=config.noise,
        )

    def __call__(self, row: int) -> np.ndarray:
        """(4, H, W) float32 in [0, 1]: each modality of a slice from its least to its greatest value."""
        image = self._render(row)[0]
        low, high = (extreme(axis=(1, 2), keepdims=True) for extreme in (image.min, image.max))
        return (image - low) / (high - low)

    def mask(self, row: int) -> np.ndarray:
        """(H, W) bool, true where the lesion is."""
        return self._render(row)[1]


def open_brain_phantom(config: DataConfig) -> Collection:
    """Return the slices: float32 (patients * slices, 4, H, W) in [0, 1], drawn when they are read, with masks.

    Modalities are FLAIR, T1, T1 with contrast agent, T2; classes "healthy" and "unhealthy". Their size is
    ``image_size``, by default 64 x 64.

    Raises:
        DataError: ``image_size`` below 32, or ``channels`` other than 4.
    """
    height, width = config.image_size or DEFAULT_SIZE
    if min(height, width) < MIN_SIDE:
        raise DataError(
            f"data.image_size: 'brain-phantom' expects at least {MIN_SIDE}, found [{height}, {width}]; "
            f"set it to [{max(height, MIN_SIDE)}, {max(width, MIN_SIDE)}] or more"
        )
    if config.channels not in (None, len(MODALITIES)):
        raise DataError(f"data.channels: 'brain-phantom' has {len(MODALITIES)}, found {config.channels}; leave it out")
    settings = config.brain_phantom
    reader = PhantomRenderer(settings, height, width)
    listed = [(p, k) for p in range(settings.patients) for k in range(settings.slices_per_patient)]
    classes = [CLASSES[int(head_of(settings, patient).has_lesion(index))] for patient, index in listed]
    return Collection(
        where="brain-phantom",
        names=tuple(f"patient{patient:05d}/slice{index:03d}" for patient, index in listed),
        class_of=tuple(name if config.labels != "none" else None for name in classes),
        read=reader,
        value_range=(0.0, 1.0),
        warnings=("data.path is not used by data.source 'brain-phantom'",) if config.path else (),
        groups=tuple(f"patient{patient:05d}" for patient, _ in listed),
        mask=reader.mask,
    )
