"""Recipe ``vae``: diffusers' AutoencoderKL, whose latents recipe ``diffusion`` can train on."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from heterodiff.codecs.discriminator import PatchDiscriminator, adaptive_weight, hinge_losses
from heterodiff.codecs.kl_vae import MAX_LOGVAR, MIN_LOGVAR, KLVAECodec, latent_shape, load_vae
from heterodiff.config import RunConfig, VAEConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.errors import ConfigError
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.pipelines.reconstruct import ReconstructionPipeline, comparison_picture
from heterodiff.training.recipes.base import Draws, Losses, Recipe, spread, store_scale

MAX_GROUPS = 8
STRUCTURAL_SCALES = 3
PREVIEW_IMAGES = 8


def build_vae(config: VAEConfig, spec: ImageSpec) -> AutoencoderKL:
    """A new AutoencoderKL for images as in ``spec``, or the one to start from.

    Raises:
        ConfigError: images that it cannot take.
        CheckpointError: nothing usable to start from.
    """
    if config.init_from is not None:
        vae = load_vae(config.init_from).requires_grad_(True)
    else:
        levels = len(config.block_out_channels)
        vae = AutoencoderKL(
            in_channels=spec.channels,
            out_channels=spec.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=math.gcd(MAX_GROUPS, *config.block_out_channels),
            sample_size=max(spec.height, spec.width),
            scaling_factor=1.0,
            mid_block_add_attention=config.mid_block_attention,
        )
    latent_shape(vae.config, spec.channels, spec.height, spec.width)
    return vae


class Autoencoder(nn.Module):
    """The VAE as one call, which distributed training needs."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1], standard normal noise (B, c, h, w) -> reconstruction, mean, log variance."""
        mean, logvar = self.vae.encode(images).latent_dist.parameters.chunk(2, dim=1)
        logvar = logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)
        return self.vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample, mean, logvar


@dataclass
class VAEDraws(Draws):
    """Noise of the latents (B, c, h, w), and whether the adversary takes part in this step."""

    noise: Tensor
    adversarial: bool


class VAERecipe(Recipe):
    """Training of an autoencoder.

    The loss of an image is the mean absolute error in [-1, 1] plus ``kl_weight`` times the KL divergence of its
    posterior from a standard normal, summed over the latent (Kingma and Welling 2014); optionally a multi-scale
    structural term and the loss of a patch discriminator (Esser et al. 2021).

    Args:
        config: the run.
        spec: of the images.
        train: images from which the scale of the latents is measured when weights are saved.
        val: images of the preview; default: training images.

    Raises:
        ConfigError: no VAE for these images.
    """

    def __init__(self, config: RunConfig, spec: ImageSpec, train: ImageDataset, val: ImageDataset):
        self.config, self.spec, self.train = config, spec, train
        self.shown = val or train
        vae = build_vae(config.vae, spec)
        self.latent_shape = latent_shape(vae.config, spec.channels, spec.height, spec.width)
        self.model = Autoencoder(vae)
        if config.vae.adversarial_weight > 0:
            refuse_adversary(config, spec)
            self.adversary = PatchDiscriminator(spec.channels)
        self.summary = "AutoencoderKL to {}x{}x{}".format(*self.latent_shape)

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> VAEDraws:
        noise = torch.randn((batch_size, *self.latent_shape), generator=generator, device=device)
        active = self.adversary is not None and step >= self.config.vae.adversarial_start
        return VAEDraws(noise, active)

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: VAEDraws) -> Losses:
        reconstruction, mean, logvar = network(inputs, draws.noise)
        reconstruction = reconstruction.float()
        each = (reconstruction - inputs).abs().flatten(1).mean(dim=1)
        parts = {"l1": each.detach()}
        if weight := self.config.vae.structural_weight:
            structural = structural_losses(inputs, reconstruction)
            parts["structural"] = structural.detach()
            each = each + weight * structural
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).flatten(1).sum(dim=1)
        parts["kl"] = kl.detach()
        total = each + self.config.vae.kl_weight * kl
        if draws.adversarial:
            total = total + self._adversarial_losses(each, reconstruction, parts)
        return Losses(total, parts, reconstruction.detach())

    def _adversarial_losses(self, each: Tensor, reconstruction: Tensor, parts: dict[str, Tensor]) -> Tensor:
        assert self.adversary is not None
        self.adversary.requires_grad_(False)
        losses = -self.adversary(reconstruction).mean(dim=1)
        self.adversary.requires_grad_(True)
        parts["adversarial"] = losses.detach()
        scale = adaptive_weight(each.mean(), losses.mean(), self.model.vae.decoder.conv_out.weight)
        return self.config.vae.adversarial_weight * scale * losses

    def adversary_losses(self, network: Callable[..., Any], inputs: Tensor, outputs: Tensor) -> Tensor:
        real, fake = network(torch.cat([inputs, outputs])).chunk(2)
        return hinge_losses(real, fake)

    def judges(self, draws: VAEDraws) -> bool:
        return draws.adversarial

    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        """Loss without the adversary, PSNR in dB and SSIM of held-out images, from the posterior mean."""
        sums: dict[str, float] = {"val_loss": 0.0, "val_psnr": 0.0, "val_ssim": 0.0}
        count = 0
        for inputs, labels in batches:
            none = torch.zeros((len(inputs), *self.latent_shape), device=inputs.device)
            found = self.losses(self.model, inputs, labels, VAEDraws(none, False))
            assert found.outputs is not None
            images, drawn = (inputs + 1) / 2, ((found.outputs + 1) / 2).clamp(0, 1)
            sums["val_loss"] += float(found.each.sum())
            sums["val_psnr"] += float(psnr(images, drawn).sum())
            sums["val_ssim"] += float(ssim(images, drawn).sum())
            count += len(inputs)
        return {name: total / count for name, total in sums.items()} if count else {}

    def pipeline(self) -> ReconstructionPipeline:
        return ReconstructionPipeline(self.model.vae)

    def preview(self, seed: int) -> Image:
        """Held-out images beside their reconstructions and the differences."""
        device = next(self.model.parameters()).device
        images = self.shown.batch(spread(len(self.shown), PREVIEW_IMAGES).tolist())[0]
        return comparison_picture(images, self.pipeline()(images.to(device)).images.cpu())

    def save(self, folder: Path) -> None:
        """Write the VAE, with the mean and std of its latents of up to 4,096 training images in its configuration."""
        store_scale(KLVAECodec(self.model.vae), self.train)
        super().save(folder)


def refuse_adversary(config: RunConfig, spec: ImageSpec) -> None:
    """Raise ConfigError for a run in which the patch discriminator cannot be trained."""
    if config.training.precision == "float16":
        raise ConfigError("vae.adversarial_weight needs training.precision bfloat16 or float32, found float16")
    if config.training.compile is True:
        raise ConfigError("vae.adversarial_weight does not go with training.compile=true; leave one of them out")
    if config.vae.adversarial_start >= config.training.steps:
        raise ConfigError(
            f"vae.adversarial_start={config.vae.adversarial_start}: the discriminator would never begin in "
            f"{config.training.steps} training.steps; lower it, or set vae.adversarial_weight=0"
        )
    if min(spec.height, spec.width) < 16:
        raise ConfigError(
            f"vae.adversarial_weight: images of {spec.height}x{spec.width} are too small for a patch "
            "discriminator, which needs 16x16; set it to 0"
        )


def structural_losses(images: Tensor, reconstruction: Tensor) -> Tensor:
    """1 - SSIM of each image (B,), averaged over up to three scales, each half the one before.

    Args:
        images, reconstruction: (B, C, H, W) in [-1, 1].
    """
    x, y = (images + 1) / 2, (reconstruction + 1) / 2
    losses = []
    for _ in range(STRUCTURAL_SCALES):
        losses.append(1 - ssim(x, y))
        if min(x.shape[-2:]) < 16:
            break
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return torch.stack(losses).mean(dim=0)


def build(config: RunConfig, data: LoadedData) -> VAERecipe:
    """Build the recipe of a run that trains a VAE.

    Raises:
        ConfigError: latents in place of images; else as :class:`VAERecipe`.
    """
    if data.latents is not None:
        raise ConfigError("recipe vae needs images, found data.source=latents; set data.source and data.path to images")
    return VAERecipe(config, data.spec, data.train, data.val)


def doubts(config: RunConfig, data: LoadedData) -> list[str]:
    """Note that the architecture keys are not read."""
    start = config.vae.init_from
    if start is None:
        return []
    return [f"the architecture is that of vae.init_from={start}; the other vae.* architecture keys are ignored"]
