"""The built-in source ``digits``: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""

from functools import partial

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.collection import Collection, read_array


def open_digits(config: DataConfig) -> Collection:
    """Return the digits: float32 (1797, 1, 8, 8) with values 0 to 16, classes "0" to "9"."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = digits.images.astype(np.float32)[:, None]
    labelled = config.labels != "none"
    return Collection(
        where="digits",
        names=tuple(str(index) for index in range(len(images))),
        class_of=tuple(str(label) if labelled else None for label in digits.target),
        read=partial(read_array, images),
        value_range=(0.0, 16.0),
    )
