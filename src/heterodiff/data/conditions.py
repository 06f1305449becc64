"""Images as conditions: beside each image another one, stored with it, or made of the image itself."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from heterodiff.config.data import ConditionConfig
from heterodiff.errors import ConfigError, DataError
from heterodiff.image_spec import ConditionSpec, ImageSpec


def upscaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic enlargement of images (B, C, h, w) to ``size``, clamped to [0, 1]."""
    return F.interpolate(images, size, mode="bicubic", align_corners=False).clamp(0, 1)


def downscaled(images: Tensor, factor: int) -> Tensor:
    """Means of squares of ``factor`` x ``factor`` pixels of images (B, C, H, W)."""
    return F.avg_pool2d(images, factor)


def edges(images: Tensor) -> Tensor:
    """Magnitude (B, 1, H, W) of the gradient of the mean channel (Sobel), its largest value in each image 1.

    Images without any edge stay zero.
    """
    padded = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, along = padded[..., 2:] - padded[..., :-2], padded[..., 2:, :] - padded[..., :-2, :]
    x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    y = along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:]
    found = (x.square() + y.square()).sqrt()
    largest = found.amax(dim=(1, 2, 3), keepdim=True)
    return found / torch.where(largest > 1e-6, largest, torch.inf)


def _low_resolution(images: Tensor, spec: ConditionSpec) -> Tensor:
    return upscaled(downscaled(images, spec.factor), (images.shape[2], images.shape[3]))


def _edges(images: Tensor, spec: ConditionSpec) -> Tensor:
    return edges(images)


MADE: dict[str, Callable[[Tensor, ConditionSpec], Tensor]] = {"downscale": _low_resolution, "edges": _edges}
"""Conditions that are made of each image (B, C, H, W) in [0, 1] when it is used, at the size of the image."""


def describe(
    config: ConditionConfig | None, channels: int, stored_channels: int, size: tuple[int, int]
) -> ConditionSpec | None:
    """Describe the condition that ``config`` asks for, of images of ``channels``.

    Args:
        stored_channels: of the images together with their condition images.
        size: (height, width) of the images.

    Raises:
        DataError: channels that the images do not have, or all that they have; a factor that does not divide the size.
    """
    if config is None:
        return None
    if config.channels is not None:
        given = tuple(sorted(set(config.channels)))
        if given[-1] >= channels or len(given) == channels:
            raise DataError(
                f"data.condition.channels={list(config.channels)}: the images have the channels 0 to {channels - 1}, "
                "of which at least one is to be drawn"
            )
        return ConditionSpec("channels", len(given), given=given, stored=True)
    if config.downscale is not None:
        if any(side % config.downscale for side in size):
            raise DataError(
                f"data.condition.downscale={config.downscale}: the images are {size[0]}x{size[1]}; expected a divisor "
                "of both, or another data.image_size"
            )
        return ConditionSpec("downscale", channels, factor=config.downscale)
    if config.edges:
        return ConditionSpec("edges", 1)
    return ConditionSpec("mask" if config.mask else "images", stored_channels - channels, stored=True)


def split_condition(images: Tensor, spec: ImageSpec) -> tuple[Tensor, Tensor | None]:
    """Split stored images (B, C + C', H, W) in [0, 1] into the image itself and its condition, both in [0, 1]."""
    if spec.condition is None:
        return images, None
    if spec.condition.stored:
        return images[:, : spec.channels], images[:, spec.channels :]
    return images, MADE[spec.condition.kind](images, spec.condition)


def to_maps(condition: Tensor, factor: int) -> Tensor:
    """Condition images (B, C', H, W) in [0, 1] as a network sees them: in [-1, 1], pixels of a position as channels."""
    return F.pixel_unshuffle(condition * 2 - 1, factor)


def condition_image(images: Tensor, spec: ImageSpec, ready: bool) -> Tensor:
    """Bring images that a user gives to the form of the run's conditions (B, C', H, W) in [0, 1].

    Args:
        images: (B, C, h, w) in [0, 1]; a low resolution is smaller than what is drawn of it.
        ready: whether they are condition images; else these are made of them as in training. Images of all channels
            never are, where the condition consists of some of these.

    Raises:
        ConfigError: a run without such a condition, or images of other channels.
    """
    condition = spec.condition
    if condition is None:
        raise ConfigError("this run was trained without images as conditions (data.condition)")
    channels, found = spec.channels + len(condition.given), images.shape[1]
    if not ready or (condition.given and found == channels):
        if condition.kind not in MADE and not condition.given:
            raise ConfigError("the condition images of this run are not made of images; give them themselves")
        if found != channels:
            raise ConfigError(f"images of {found} channels: expected {channels}, as at training")
        return images[:, list(condition.given)] if condition.given else MADE[condition.kind](images, condition)
    if found != condition.channels:
        raise ConfigError(f"condition images of {found} channels: expected {condition.channels}, as at training")
    height, width = images.shape[2] * condition.factor, images.shape[3] * condition.factor
    return upscaled(images, (height, width)) if condition.factor > 1 else images
