"""Default sizes of the denoisers, the same for all that builds them, and sizes of images that they take."""

from collections.abc import Sequence

from heterodiff.errors import ConfigError

MODEL_CHANNELS = 64
LAYERS_PER_BLOCK = 2
NUM_HEADS = 4
HEAD_CHANNELS = 32
"""Channels of an attention head of the lean networks."""
SPARSITY = 0.9

FILM_CHANNEL_MULT = (1, 2)

NORM_GROUPS = 32
"""Groups of the norms of earlier checkpoints; channels are multiples of it."""
LEAN_NORM_GROUPS = 8
"""Groups of the norms of the lean networks: with 32, a norm of 32 channels takes away the mean of each one."""

CHANNEL_MULT_BY_SIDE = (
    (8, (1, 2)),
    (32, (1, 2, 2)),
    (64, (1, 2, 2, 4)),
    (128, (1, 1, 2, 3, 4)),
)
"""Width factors of the levels by the longer side of the maps; larger maps take ``LARGE_CHANNEL_MULT``."""
LARGE_CHANNEL_MULT = (1, 1, 2, 2, 4, 4)

ATTENTION_SIDE = 16
"""Maps up to this side get attention by default."""


MIN_LEVELS = 2


def _halvings(side: int) -> int:
    """Number of times that ``side`` can be halved to an integer."""
    return (side & -side).bit_length() - 1


def default_levels(
    sample_size: int | Sequence[int],
    patch_size: int = 1,
    channel_mult: Sequence[int | float] | None = None,
    attention_resolutions: Sequence[int] | None = None,
    attention_side: int = ATTENTION_SIDE,
) -> tuple[tuple[int | float, ...], tuple[int, ...]]:
    """Choose the levels of a network of the HAE family.

    Args:
        sample_size: height and width of the images or latents, or one number for both.
        patch_size: side in pixels of the patches that the first level gets as one position each.
        channel_mult, attention_resolutions: returned as they are, unless None.

    Returns:
        channel_mult by the size, with as many levels as halve it evenly, two at least; and as attention_resolutions
        all downsampling factors at which maps have at most ``attention_side`` positions a side.
    """
    sides = [sample_size] if isinstance(sample_size, int) else list(sample_size)
    side = max(sides) / max(1, patch_size)
    if channel_mult is None:
        channel_mult = next((mult for largest, mult in CHANNEL_MULT_BY_SIDE if side <= largest), LARGE_CHANNEL_MULT)
        if all(one % max(1, patch_size) == 0 for one in sides):  # else no number of levels suits
            halvings = min(_halvings(one // max(1, patch_size)) for one in sides)
            channel_mult = channel_mult[: max(MIN_LEVELS, halvings + 1)]
    if attention_resolutions is None:
        factors = (2**level for level in range(len(channel_mult)))
        attention_resolutions = [factor for factor in factors if side / factor <= attention_side]
    return tuple(channel_mult), tuple(attention_resolutions)


def check_size(height: int, width: int, factor: int) -> None:
    """Check that ``factor`` divides height and width.

    Raises:
        ConfigError: it does not; the message names the nearest sizes.
    """
    if height % factor == 0 and width % factor == 0:
        return
    nearest = [sorted({max(factor, n // factor * factor), -(-n // factor) * factor}) for n in (height, width)]
    raise ConfigError(
        f"image size {height}x{width}: this network needs height and width divisible by {factor}; "
        f"nearest heights {nearest[0]}, nearest widths {nearest[1]} (data.image_size), or fewer levels "
        "(model.channel_mult)"
    )
