"""Distributions of the noise that is added to images: Gaussian, and the smoother simplex noise of AnoDDPM.

Each has mean 0 and variance 1 at every pixel, so that the noise schedule means the same for all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from heterodiff.errors import ConfigError, unknown_name

Generators = torch.Generator | list[torch.Generator] | None

OCTAVES, FREQUENCY, PERSISTENCE = 6, 2**-6, 0.8
"""Octaves, the first one's frequency in cycles a pixel, and the factor from amplitude to amplitude (Wyatt et al. 2022);
frequencies double from octave to octave."""
SKEW, UNSKEW = (math.sqrt(3) - 1) / 2, (3 - math.sqrt(3)) / 6
"""The shear that turns the triangular lattice into the integer grid, and the one that turns it back."""
RADIUS_SQUARED = 0.5
"""Squared reach of a lattice point: the height of a triangle, so that three points reach a position."""
# The mean over positions of sum_k w(d_k)^2 |d_k|^2 / 2, for points k at offsets d_k: sqrt(3) points a unit of area,
# times the integral over the disc of (R^2 - s^2)^8 s^2 / 2.
VARIANCE = math.sqrt(3) * math.pi / 2 * RADIUS_SQUARED**10 / 90
"""Variance of an octave of amplitude 1."""


def gaussian_noise(shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
    """Return standard normal noise (B, C, H, W), float32.

    Args:
        generator: one for the batch, or a list of B, one per sample: then a batch equals its samples drawn
            one by one. Generators on the CPU give the same noise on all devices.
    """
    return randn_tensor(tuple(shape), generator=generator, device=torch.device(device), dtype=torch.float32)


def simplex_noise(shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
    """Return a sum of octaves of two-dimensional simplex noise (B, C, H, W), float32; arguments as Gaussian noise.

    Wyatt et al. 2022 (AnoDDPM), section 3.2; simplex noise: Perlin 2001. Octave k has amplitude 0.8^k and 2^(k - 6)
    cycles a pixel, k = 0..5. Pixels are not normally distributed, and neighbours are correlated: noise that hides
    shapes rather than pixels. Each image has lattices of its own, shifted at random, so that the distribution is the
    same at all pixels; each channel has gradients of its own, so that channels are uncorrelated.
    """
    batch, channels, height, width = shape
    sizes = [lattice_size(height, width, FREQUENCY * 2**k) for k in range(OCTAVES)]
    counts = [channels * rows * columns for rows, columns in sizes]
    shifts, *parts = _uniform((batch, 2 * OCTAVES + sum(counts)), generator, torch.device(device)).split(
        [2 * OCTAVES, *counts], dim=1
    )
    total = torch.zeros(tuple(shape), device=shifts.device)
    for k, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        angles = 2 * math.pi * part.view(batch, channels, *size)
        octave = simplex_octave(angles, shifts[:, 2 * k : 2 * k + 2], height, width, FREQUENCY * 2**k)
        total.add_(octave, alpha=PERSISTENCE**k)
    energy = VARIANCE * sum(PERSISTENCE ** (2 * k) for k in range(OCTAVES))
    return total / math.sqrt(energy)


def lattice_size(height: int, width: int, frequency: float) -> tuple[int, int]:
    """Return how many lattice points an octave needs along the skewed axes of rows and of columns."""
    diagonal = SKEW * (height + width - 2)
    return int(frequency * (height - 1 + diagonal)) + 3, int(frequency * (width - 1 + diagonal)) + 3


def simplex_octave(angles: Tensor, shift: Tensor, height: int, width: int, frequency: float) -> Tensor:
    """Return fields (B, C, H, W) of simplex noise, of variance :data:`VARIANCE`.

    A position at offset d from a lattice point with unit gradient g gets (R^2 - |d|^2)^4 g.d from it.

    Args:
        angles: (B, C, *lattice_size) directions of the gradients, in radians.
        shift: (B, 2) in [0, 1), position of the first pixel along the skewed axes (rows, columns).
        frequency: lattice lengths a pixel.
    """
    rows = frequency * torch.arange(height, device=angles.device)[:, None]
    columns = frequency * torch.arange(width, device=angles.device)[None, :]
    diagonal = SKEW * (rows + columns)
    v, u = (shift[:, k, None, None] + axis + diagonal for k, axis in enumerate((rows, columns)))
    row, column = v.floor(), u.floor()
    v, u = v - row, u - column
    lower = (v > u).long()  # which of the two triangles of a cell
    stride = angles.shape[-1]
    first = row.long() * stride + column.long()
    gradients = [part.flatten(2) for part in (angles.sin(), angles.cos())]
    total = angles.new_zeros(*angles.shape[:2], height * width)
    corners: Any = ((0, 0), (lower, 1 - lower), (1, 1))
    for down, right in corners:
        dv, du = v - down, u - right
        back = UNSKEW * (dv + du)
        offsets = dv - back, du - back
        weight = (RADIUS_SQUARED - sum(d.square() for d in offsets)).clamp(min=0).pow(4)
        index = (first + down * stride + right).flatten(1)[:, None].expand(total.shape)
        for gradient, offset in zip(gradients, offsets, strict=True):
            total.addcmul_(gradient.gather(2, index), (weight * offset).flatten(1)[:, None])
    return total.view(*angles.shape[:2], height, width)


def _uniform(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1); drawn where their generators are."""
    if isinstance(generator, list):
        return torch.cat([_uniform((1, *shape[1:]), one, device) for one in generator])
    drawn_on = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=drawn_on).to(device)


@dataclass(frozen=True)
class Noise:
    """A distribution of noise.

    Attributes:
        draw: (shape (B, C, H, W), generator, device) -> noise, see :func:`gaussian_noise`.
        is_gaussian: whether stochastic samplers, which add Gaussian noise at each step, draw with it.
    """

    draw: Callable[[Sequence[int], Generators, torch.device | str], Tensor]
    is_gaussian: bool = False


NOISES = {"gaussian": Noise(gaussian_noise, is_gaussian=True), "simplex": Noise(simplex_noise)}


def find_noise(name: str) -> Noise:
    """Return the noise called ``name``; raises ConfigError if there is none."""
    if name not in NOISES:
        raise ConfigError(unknown_name("noise", name, NOISES))
    return NOISES[name]
