"""Codecs: the space in which diffusion happens."""

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Maps images in [0, 1] to the space of the diffusion, in two halves, and back.

    The first half, :meth:`posterior`, can be computed once and stored; the second, :meth:`draw`, is cheap and is done
    for every batch. It is the only place that scales.

    Attributes:
        clip_sample: whether encoded images lie in [-1, 1], so that predictions may be clipped to it.
        random: whether :meth:`draw` uses noise.
        factor: height and width of an image over those of its latent.
    """

    clip_sample: bool
    random: bool
    factor: int

    def posterior(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> what is to be known of their latents."""
        ...

    def draw(self, posterior: Tensor, noise: Tensor | None) -> Tensor:
        """What :meth:`posterior` gave -> z of unit variance; without ``noise``, the most likely one."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """z -> (B, C, H, W) in [0, 1]."""
        ...

    def to(self, device: torch.device) -> "Codec":
        """Move to ``device`` and return itself."""
        ...


class PixelCodec:
    """Diffusion on the pixels themselves, scaled to [-1, 1]."""

    clip_sample = True
    random = False
    factor = 1

    def posterior(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def draw(self, posterior: Tensor, noise: Tensor | None) -> Tensor:
        return posterior

    def decode(self, z: Tensor) -> Tensor:
        return ((z + 1) / 2).clamp(0, 1)

    def to(self, device: torch.device) -> "PixelCodec":
        return self
