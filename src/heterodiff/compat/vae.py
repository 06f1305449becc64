"""A VAE under the call signatures of earlier latent diffusion scripts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.devices import find_device
from heterodiff.errors import ConfigError, DataError

ROUND_TRIP_MSE = 0.01
RANGE_TOLERANCE = 1e-3


class VAEInterface:
    """Encode and decode batches with the VAE at ``vae_path``; its own scale is used, never a constant.

    Args:
        vae_path: a run of recipe ``vae``, a folder with a diffusers AutoencoderKL, or a file of weights in the layout
            of latent diffusion (.pt, .ckpt, .safetensors).
        device: default: a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: no VAE there, or one that cannot be loaded.
        ConfigError: a device that this machine does not have.
    """

    def __init__(self, vae_path: str | Path, device: str | torch.device | None = None):
        self.device = find_device(device)
        self.codec = KLVAECodec(load_vae(vae_path))
        self.codec.to(self.device)

    @property
    def vae(self) -> Any:
        """The AutoencoderKL itself, which works on images in [-1, 1] and on latents that are not scaled."""
        return self.codec.vae

    @property
    def scale_factor(self) -> float:
        """Factor that gives latents unit std, after the mean of each channel is taken off; a mean over the channels."""
        channels = self.codec.latent_channels
        zeros, ones = (self.codec.scale(torch.full((1, channels, 1, 1), value)) for value in (0.0, 1.0))
        return float((ones - zeros).mean())

    def encode_batch(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> latents (B, c, h, w) of unit std, from the mean of the posterior.

        Raises:
            ConfigError: channels or a size that the VAE cannot take.
            DataError: values outside [0, 1], or NaN.
        """
        images = torch.as_tensor(images)
        if images.ndim != 4 or len(images) == 0:
            channels = self.codec.vae.config.in_channels
            raise ConfigError(f"images {tuple(images.shape)}: the VAE encodes (B, {channels}, H, W), B above 0")
        self.codec.latent_shape(*images.shape[1:])
        low, high = float(images.min()), float(images.max())
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise DataError(f"images to encode hold values {low:g} to {high:g}; expected [0, 1]: scale them first")
        return self.codec.encode(images.to(self.device, torch.float32))

    def decode_batch(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) as from :meth:`encode_batch` -> images (B, C, H, W), clamped to [0, 1].

        Raises:
            ConfigError: another number of channels than the VAE's.
        """
        latents = torch.as_tensor(latents)
        if latents.ndim != 4 or latents.shape[1] != self.codec.latent_channels:
            raise ConfigError(
                f"latents {tuple(latents.shape)}: the VAE decodes (B, {self.codec.latent_channels}, h, w)"
            )
        return self.codec.decode(latents.to(self.device, torch.float32))

    def get_latent_size(self, image_size: int) -> int:
        """Side of the latent of an image with sides of ``image_size`` pixels.

        Raises:
            ConfigError: a side that the VAE's factor does not divide.
        """
        return self.codec.latent_shape(self.codec.vae.config.in_channels, image_size, image_size)[1]

    def test_roundtrip(self, images: Tensor, max_mse: float = ROUND_TRIP_MSE) -> bool:
        """Check that images (B, C, H, W) in [0, 1] are reconstructed with a mean squared error below ``max_mse``."""
        decoded = self.decode_batch(self.encode_batch(images)).cpu()
        return float((decoded - torch.as_tensor(images).cpu()).square().mean()) < max_mse
