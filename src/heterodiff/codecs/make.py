"""Making codecs from configurations and run folders."""

from pathlib import Path

from heterodiff.codecs import cnn, kl_vae
from heterodiff.codecs.base import Codec, PixelCodec
from heterodiff.codecs.scaling import LatentCodec
from heterodiff.config import CodecConfig


def make_codec(config: CodecConfig) -> Codec:
    """Make the codec that ``config`` describes.

    Raises:
        CheckpointError: a network that cannot be loaded.
    """
    if config.kind == "pixels":
        return PixelCodec()
    assert config.path is not None
    if config.kind == "cnn":
        return cnn.CNNCodec(cnn.load_image_codec(config.path))
    return kl_vae.KLVAECodec(kl_vae.load_vae(config.path))


def latent_shape(config: CodecConfig, channels: int, height: int, width: int) -> tuple[int, int, int]:
    """Shape of the latents of images (channels, height, width), without loading weights.

    Raises:
        CheckpointError: no network there.
        ConfigError: images that it cannot take.
    """
    if config.kind == "pixels":
        return channels, height, width
    assert config.path is not None
    if config.kind == "cnn":
        return cnn.latent_shape(cnn.read_codec_config(config.path), channels, height, width)
    return kl_vae.latent_shape(kl_vae.read_vae_config(config.path), channels, height, width)


def load_saved_codec(run: Path) -> LatentCodec | None:
    """Load the codec of latents of which a run folder holds a copy; None if it holds none.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if (run / cnn.FOLDER).is_dir():
        return cnn.CNNCodec(cnn.load_image_codec(run))
    return kl_vae.KLVAECodec(kl_vae.load_vae(run / "vae")) if kl_vae.holds_vae(run / "vae") else None
