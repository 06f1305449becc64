"""Built-in sources whose images are drawn from a seed when they are read."""

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.errors import DataError

DEFAULT_SIZE = (64, 64)


def random_state(seed: int, *numbers: int) -> np.random.RandomState:
    """Return a generator that depends on ``seed`` and ``numbers``, such as that of the image, alone.

    ``RandomState`` because NumPy promises never to change its stream; that of ``default_rng`` may change.
    """
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, *numbers])


def drawn_size(config: DataConfig, min_side: int, channels: int) -> tuple[int, int]:
    """Return (height, width) of the images to draw: ``image_size``, by default 64 x 64.

    Raises:
        DataError: a side below ``min_side``, or another number of channels asked for.
    """
    height, width = config.image_size or DEFAULT_SIZE
    if min(height, width) < min_side:
        raise DataError(
            f"data.image_size: '{config.source}' expects at least {min_side}, found [{height}, {width}]; "
            f"set it to [{max(height, min_side)}, {max(width, min_side)}] or more"
        )
    if config.channels not in (None, channels):
        raise DataError(f"data.channels: '{config.source}' has {channels}, found {config.channels}; leave it out")
    return height, width
