"""Codecs: the space in which diffusion happens."""

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Map between images in [0, 1] and the space of the diffusion.

    Encoding has two halves: :meth:`posterior` can be computed once and stored; :meth:`draw`, the only place that
    scales, is cheap and runs for every batch.

    Attributes:
        clip_sample: True if encoded images lie in [-1, 1], so that predictions may be clipped to it.
        random: True if :meth:`draw` uses noise.
        factor: height and width of an image relative to those of its latent.
    """

    clip_sample: bool
    random: bool
    factor: int

    def posterior(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> posterior parameters of the latents."""
        ...

    def draw(self, posterior: Tensor, noise: Tensor | None) -> Tensor:
        """Posterior parameters -> z of unit variance; without ``noise``, the most likely one."""
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
