"""The built-in source ``brain-phantom``: simulated heads in four MRI modalities, some slices with a lesion."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from heterodiff.config import BrainPhantomConfig, DataConfig
from heterodiff.data.collection import Collection
from heterodiff.data.sources.slices import CLASSES, stretch_slice
from heterodiff.simulators import drawn_size, random_state
from heterodiff.simulators.brain_phantom.head import MODALITIES, Head, render

MIN_SIDE = 32
_REACH = 0.7
"""Distance of the outermost slices from the middle of the head, in units of its half height."""


@lru_cache(maxsize=1024)
def head_of(config: BrainPhantomConfig, patient: int) -> Head:
    """The head of a patient, which depends on seed, shares and patient number alone."""
    rng = random_state(config.seed, patient)
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
        rng = random_state(config.seed, patient, index)
        z = _REACH * (2 * (index + 0.5) / config.slices_per_patient - 1)
        strengths = {"contrast": config.contrast, "bias": config.bias, "noise": config.noise}
        return render(head_of(config, patient), index, z, rng, (self.height, self.width), **strengths)

    def __call__(self, row: int) -> np.ndarray:
        """(4, H, W) float32 in [0, 1]: each modality of a slice from its least to its greatest value."""
        return stretch_slice(self._render(row)[0])

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
    settings = config.brain_phantom
    reader = PhantomRenderer(settings, *drawn_size(config, MIN_SIDE, len(MODALITIES)))
    listed = [(p, k) for p in range(settings.patients) for k in range(settings.slices_per_patient)]
    classes = [CLASSES[int(head_of(settings, patient).has_lesion(index))] for patient, index in listed]
    return Collection(
        where="brain-phantom",
        names=tuple(f"patient{patient:05d}/slice{index:03d}" for patient, index in listed),
        class_of=tuple(name if config.labels != "none" else None for name in classes),
        read=reader,
        value_range=(0.0, 1.0),
        groups=tuple(f"patient{patient:05d}" for patient, _ in listed),
        mask=reader.mask,
    )
