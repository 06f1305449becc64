"""Images through a VAE and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL.Image import Image
from torch import Tensor

from heterodiff.codecs.kl_vae import KLVAECodec
from heterodiff.codecs.scaling import measure, scaled_std
from heterodiff.pictures import image_grid

ENCODE_BATCH = 32
DIFFERENCE_GAIN = 4


@dataclass
class ReconstructionOutput(BaseOutput):
    """Reconstructed images (B, C, H, W) in [0, 1]."""

    images: Tensor


class ReconstructionPipeline(DiffusionPipeline):
    """The VAE of a run of recipe ``vae``; ``heterodiff.load`` builds it from the run folder."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.register_modules(vae=vae)

    @property
    def codec(self) -> KLVAECodec:
        """Encodes to latents of unit variance, and decodes."""
        return KLVAECodec(self.vae)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ReconstructionOutput:
        """Encode images (B, C, H, W) in [0, 1] and decode the most likely latents.

        Raises ConfigError for another number of channels than the VAE's, or sides it cannot take.
        """
        codec = self.codec
        codec.latent_shape(images.shape[1], images.shape[2], images.shape[3])
        parts = [codec.decode(codec.encode(part.to(self.device))).cpu() for part in images.split(ENCODE_BATCH)]
        return ReconstructionOutput(images=torch.cat(parts))

    def latent_std(self, images: Tensor) -> Tensor:
        """Std of the scaled latents of images (B, C, H, W) in [0, 1]: a channel each (c,), or over all (1,).

        Raises:
            DataError: NaN or infinite latents, or a channel that never varies.
        """
        codec = self.codec
        posteriors = (codec.posterior(part.to(self.device)) for part in images.split(ENCODE_BATCH))
        return scaled_std(codec, *measure(posteriors, codec.latent_channels))


def comparison_picture(images: Tensor, reconstructions: Tensor) -> Image:
    """Draw rows of original, reconstruction, and four times their absolute difference; all (B, C, H, W) in [0, 1]."""
    difference = (DIFFERENCE_GAIN * (images - reconstructions).abs()).clamp(0, 1)
    if images.shape[1] == 4:  # drawn with transparency: let differences be seen
        difference[:, 3] = 1
    tiles = torch.stack([images, reconstructions, difference], dim=1).flatten(0, 1)
    return image_grid(tiles, ["original", "reconstruction", f"difference x{DIFFERENCE_GAIN}"] * len(images), columns=3)


def try_out(pipeline: ReconstructionPipeline, add: Callable[[bool, str, str], None]) -> None:
    """Reconstruct one picture of noise."""
    vae = pipeline.vae.config
    side = 8 * pipeline.codec.factor
    images = pipeline(torch.rand(1, vae.in_channels, side, side)).images
    scale = ", ".join(f"{value:.3g}" for value in vae.latents_std or [1 / vae.scaling_factor])
    add(bool(torch.isfinite(images).all()), "vae", f"reconstructs an image; std of its latents {scale}")
