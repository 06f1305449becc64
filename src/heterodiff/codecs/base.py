"""Codecs: the space in which diffusion happens."""

from typing import Protocol

from torch import Tensor

from heterodiff.config import CodecConfig


class Codec(Protocol):
    """Maps images in [0, 1] to the space of the diffusion and back.

    Attributes:
        clip_sample: whether encoded images lie in [-1, 1], so that predictions may be clipped to it.
    """

    clip_sample: bool

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> z."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """z -> (B, C, H, W) in [0, 1]."""
        ...


class PixelCodec:
    """Diffusion on the pixels themselves, scaled to [-1, 1]."""

    clip_sample = True

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def decode(self, z: Tensor) -> Tensor:
        return ((z + 1) / 2).clamp(0, 1)


def make_codec(config: CodecConfig) -> Codec:
    """The codec that ``config.kind`` names."""
    return {"pixels": PixelCodec}[config.kind]()
