"""From the configuration of a codec to the codec."""

from heterodiff.codecs import kl_vae
from heterodiff.codecs.base import Codec, PixelCodec
from heterodiff.config import CodecConfig


def make_codec(config: CodecConfig) -> Codec:
    """The codec that ``config`` describes.

    Raises:
        CheckpointError: a VAE that cannot be loaded.
    """
    if config.kind == "pixels":
        return PixelCodec()
    assert config.path is not None
    return kl_vae.KLVAECodec(kl_vae.load_vae(config.path))


def latent_shape(config: CodecConfig, channels: int, height: int, width: int) -> tuple[int, int, int]:
    """Shape of the latents of images (channels, height, width), found without loading weights.

    Raises:
        CheckpointError: no VAE there.
        ConfigError: images that it cannot take.
    """
    if config.kind == "pixels":
        return channels, height, width
    assert config.path is not None
    return kl_vae.latent_shape(kl_vae.read_vae_config(config.path), channels, height, width)
