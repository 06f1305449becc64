"""Text to image on small latents, under the class names of earlier scripts; each is one of our own objects.

New code uses ``heterodiff.create_model("film-unet", ...)`` and runs of recipe ``text-image``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from heterodiff.codecs.cnn import STAGES, ImageCodec
from heterodiff.compat.gaussian_diffusion import GaussianDiffusion
from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.noise import gaussian_noise
from heterodiff.diffusion.objective import DiffusionObjective
from heterodiff.diffusion.sampling import sample
from heterodiff.errors import ConfigError, RunError
from heterodiff.models import blocks
from heterodiff.models.blocks import ResBlock, timestep_embedding
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.pipelines.load import load_text_image
from heterodiff.pipelines.text_to_image import TextImagePipeline, predict


class SinusoidalPositionEmbedding(nn.Module):
    """Timesteps (B,) -> sinusoids (B, dim), as all denoisers here have them."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        return timestep_embedding(timesteps, self.dim)


class ResBlockWithCondition(ResBlock):
    """Residual block with FiLM: x (B, C_in, H, W), condition (B, condition_dim) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, condition_dim: int, dropout: float = 0.0):
        super().__init__(in_channels, out_channels, condition_dim, dropout, use_scale_shift_norm=True)

    def forward(self, x: Tensor, condition: Tensor, recompute: bool = False) -> Tensor:
        return super().forward(x, F.silu(condition), recompute)


class AttentionBlock(blocks.AttentionBlock):
    """Self-attention over all positions, with a skip connection: x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, num_heads: int = 4):
        super().__init__(channels, num_heads, condition_dim=None)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(x, condition)


class ConditionalUNet2D(FiLMUNet):
    """``film-unet`` of the earlier widths: 256 -> 128 -> 256 -> 512 channels at constant size, 48 M parameters.

    Args:
        in_channels, out_channels: of the latents; default of the second: as the first.
        condition_dim: width of the condition, such as a text embedding.
        latent_size: intended height and width of the latents.
        model_channels, channel_mult, layers_per_block, num_heads, dropout: as of :class:`FiLMUNet`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 256,
        out_channels: int | None = None,
        condition_dim: int = 512,
        latent_size: int | tuple[int, int] = 7,
        model_channels: int = 128,
        channel_mult: Sequence[int | float] = (2, 4),
        layers_per_block: int = 2,
        num_heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__(
            latent_channels=in_channels,
            latent_size=latent_size,
            condition_dim=condition_dim,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            layers_per_block=layers_per_block,
            num_heads=num_heads,
            dropout=dropout,
        )

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Predict from z_t (B, in_channels, H, W), timesteps (B,) and condition (B, condition_dim); None: none."""
        return super().forward(x, timesteps, condition=condition, return_dict=False)[0]


class LatentDiffusionUNet(nn.Module):
    """A :class:`ConditionalUNet2D` that predicts the noise, with its linear noise schedule.

    Args:
        latent_channels, latent_size, condition_dim: of the latents and the condition.
        num_timesteps: training timesteps.
        **widths: further arguments of :class:`ConditionalUNet2D`.

    Attributes:
        diffusion: the process, see :class:`GaussianDiffusion`.
    """

    def __init__(
        self,
        latent_channels: int = 256,
        latent_size: int = 7,
        condition_dim: int = 512,
        num_timesteps: int = 1000,
        **widths: Any,
    ):
        super().__init__()
        self.shape = (latent_channels, latent_size, latent_size)
        self.condition_dim = condition_dim
        self.unet = ConditionalUNet2D(latent_channels, None, condition_dim, latent_size, **widths)
        self.diffusion = GaussianDiffusion(num_timesteps)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the noise in z_t (B, c, h, w) at timesteps (B,), given a condition (B, condition_dim) or none."""
        return self.unet(x, timesteps, condition)

    def compute_loss(
        self, latents: Tensor, condition: Tensor, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss of clean ``latents`` (B, c, h, w); t (B,) and noise default to draws of torch's own."""
        if t is None:
            t = torch.randint(self.diffusion.num_timesteps, (len(latents),), device=latents.device)
        return self.diffusion.training_losses(self, latents, t, {"condition": condition}, noise)["loss"].mean()

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw latents (B, c, h, w) by DDIM, given conditions (B, condition_dim); a row of zeros is "no condition"."""
        device = next(self.parameters()).device
        noise = gaussian_noise((len(condition), *self.shape), generator, device)
        denoiser = Denoiser(self, self.diffusion.schedule, "epsilon")
        guided = denoiser.guided(condition.to(device), torch.zeros_like(condition, device=device), guidance_scale)
        return sample(*guided, noise=noise, sampler="ddim", num_inference_steps=num_inference_steps)


class ImageDecoder(ImageCodec):
    """The decoding half of an :class:`ImageCodec`: maps and embeddings to images.

    Args:
        latent_channels, latent_size: of the maps; images have ``2 ** stages`` times their sides.
        embedding_dim: width of embeddings.
        out_channels: channels of the images.
        block_out_channels: channels of the stages, each of which doubles height and width, in the encoder's order.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 256,
        latent_size: int = 7,
        embedding_dim: int = 512,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = STAGES,
    ):
        side = latent_size * 2 ** len(block_out_channels)
        super().__init__(
            in_channels=out_channels,
            sample_size=(side, side),
            block_out_channels=block_out_channels,
            latent_channels=latent_channels,
            embedding_dim=embedding_dim,
        )
        del self.encoder, self.embedder

    def forward(self, latents: Tensor) -> Tensor:
        """Maps (B, c, h, w) -> images (B, C, H, W) in [0, 1]."""
        return self.decode_from_latent(latents)


class GenerativeMultimodalModel(nn.Module):
    """The networks of a run of recipe ``text-image``, to train on and to draw with.

    Args:
        run: its folder, or the pipeline of one.
        device: see :func:`heterodiff.load`.

    Attributes:
        pipeline: the :class:`TextImagePipeline`, which does the work.

    Raises:
        RunError, CheckpointError: no such run, or one without texts or without a denoiser.
    """

    def __init__(self, run: str | Path | TextImagePipeline, device: str | None = None):
        super().__init__()
        pipeline = load_text_image(run, device, dtype="float32") if isinstance(run, str | Path) else run
        if pipeline.unet is None:
            raise RunError(f"{run}: no denoiser (recipe alignment); train a run of recipe text-image")
        self.pipeline = pipeline
        for name in ("unet", "image_codec", "text_encoder", "captioner"):
            self.add_module(name, getattr(pipeline, name))
        schedule = pipeline.denoiser.schedule
        settings = {"prediction": pipeline.denoiser.prediction, "num_train_timesteps": schedule.num_train_timesteps}
        learned = pipeline.unet.config.out_channels == 2 * pipeline.codec.latent_channels
        config = DiffusionConfig(**settings, learn_variance=learned)
        self._objective = DiffusionObjective(config, schedule)

    def compute_diffusion_loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the denoiser's mean loss.

        Args:
            image_features: maps (B, c, h, w) of the image codec (``image_codec.encode``), which get no gradient; or
                embeddings (B, D), whose expected maps stand for them.
            text_features: embeddings (B, D) of texts; a row of zeros is "no condition".
            t, noise: (B,) timesteps and (B, c, h, w); default: drawn from torch's global generator.

        Raises:
            ConfigError: features of other shapes.
        """
        codec, width = self.pipeline.codec, self.pipeline.text_encoder.config.embedding_dim
        shape = (codec.latent_channels, *self.pipeline.image_codec.latent_size)
        if text_features.shape[1:] != (width,) or image_features.shape[1:] not in ((width,), shape):
            raise ConfigError(
                f"features {tuple(image_features.shape)} of images and {tuple(text_features.shape)} of texts: expected "
                f"(B, {', '.join(map(str, shape))}) or (B, {width}), and (B, {width})"
            )
        with torch.no_grad():
            maps = image_features
            if maps.ndim == 2:
                maps = self.pipeline.image_codec.get_latent_from_embedding(maps)
            target, expected = codec.scale(maps.float()), codec.prior(text_features)
        if t is None:
            t = torch.randint(self._objective.schedule.num_train_timesteps, (len(target),), device=target.device)
        noise = torch.randn_like(target) if noise is None else noise
        losses, _ = self._objective.losses(
            lambda z, time: predict(self.pipeline.unet, z, time, text_features, expected), target, t, noise
        )
        return losses.mean()

    def generate_image_from_text(self, text_embeddings: Tensor, **options: Any) -> Tensor:
        """Draw images (B, C, H, W) in [0, 1], see :meth:`TextImagePipeline.generate_image_from_text`."""
        return self.pipeline.generate_image_from_text(text_embeddings, **options)

    def generate_text_from_image(self, images: Tensor, *arguments: Any, **options: Any) -> list[list[str]]:
        """Write captions, see :meth:`TextImagePipeline.generate_text_from_image`."""
        return self.pipeline.generate_text_from_image(images, *arguments, **options)
