"""The recipe ``diffusion``: a denoiser of images, steered by their class labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from heterodiff.codecs.cnn import FEATURE_CHANNELS
from heterodiff.codecs.kl_vae import KLVAECodec
from heterodiff.codecs.make import latent_shape, make_codec
from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageSpec
from heterodiff.devices import send
from heterodiff.diffusion.objective import DiffusionObjective
from heterodiff.diffusion.samplers import make_sampler
from heterodiff.diffusion.schedule import NoiseSchedule, training_scheduler
from heterodiff.diffusion.timesteps import make_timestep_sampler
from heterodiff.errors import ConfigError
from heterodiff.models.conditioning import NO_CLASS
from heterodiff.models.defaults import FILM_CHANNEL_MULT, default_levels
from heterodiff.models.unet import check_size
from heterodiff.models.variants import VARIANTS, create_model
from heterodiff.pictures import image_grid
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.training.latents import prepare_latents
from heterodiff.training.processes import HostGroup
from heterodiff.training.recipes.base import Losses

PREVIEW_CLASSES = 10
PREVIEW_COLUMNS = 8
PREVIEW_COLUMNS_LARGE = 4  # of images above 32x32, which take long to draw on a CPU


def model_arguments(config: RunConfig, spec: ImageSpec) -> dict[str, Any]:
    """Arguments of the configured denoiser for images as in ``spec``, defaults filled in.

    Raises:
        ConfigError: the image size does not suit the codec or the number of levels (the nearest sizes are named).
        CheckpointError: the codec's VAE is not there.
    """
    m = config.model
    channels, height, width = latent_shape(config.codec, spec.channels, spec.height, spec.width)
    with_text = config.recipe == "text-image"
    condition_dim = config.text.embedding_dim if with_text else None
    # Beside the latents: the text's prior over the map and, but for joint training, over its features.
    prior_channels = channels + (0 if config.alignment.joint else FEATURE_CHANNELS) if with_text else 0
    out_channels = channels * (2 if config.diffusion.learn_variance else 1)
    if m.variant == "film-unet":
        return {
            "latent_channels": channels,
            "latent_size": (height, width),
            "condition_dim": condition_dim,
            "guess_channels": prior_channels,
            "out_channels": out_channels,
            "model_channels": m.model_channels,
            "channel_mult": m.channel_mult or FILM_CHANNEL_MULT,
            "layers_per_block": m.layers_per_block,
            "num_heads": m.num_heads,
            "dropout": m.dropout,
            "use_checkpoint": m.gradient_checkpointing,
        }
    channel_mult, attention = default_levels((height, width), m.patch_size, m.channel_mult, m.attention_resolutions)
    factor = m.patch_size * 2 ** (len(channel_mult) - 1) * (spec.height // height)
    check_size(spec.height, spec.width, factor)  # in pixels, as the user gives them
    return {
        "sample_size": (height, width),
        "in_channels": channels + prior_channels,
        "out_channels": out_channels,
        "num_classes": len(spec.class_names) or None,
        "condition_dim": condition_dim,
        "model_channels": m.model_channels,
        "channel_mult": channel_mult,
        "layers_per_block": m.layers_per_block,
        "patch_size": m.patch_size,
        "attention_resolutions": attention,
        "dropout": m.dropout,
        "num_heads": m.num_heads,
        "num_head_channels": m.num_head_channels,
        "use_scale_shift_norm": m.use_scale_shift_norm,
        "resblock_updown": m.resblock_updown,
        "use_checkpoint": m.gradient_checkpointing,
        "memory_optimization": m.memory_optimization,
        "attention_pattern": m.attention_pattern,
        "sparsity": m.sparsity,
    }


@dataclass
class Draws:
    """The random numbers of a step, one row an image."""

    t: Tensor
    weights: Tensor
    noise: Tensor
    drop: Tensor
    latent_noise: Tensor | None = None  # of the draw from the codec's posterior
    choice: Tensor | None = None  # among an image's captions

    def rows(self, part: slice) -> "Draws":
        latent_noise, choice = (None if x is None else x[part] for x in (self.latent_noise, self.choice))
        return Draws(self.t[part], self.weights[part], self.noise[part], self.drop[part], latent_noise, choice)


class DiffusionRecipe:
    """What the loop needs to know to train a denoiser.

    Args:
        config: the run.
        spec: of the images.

    Attributes:
        model: the network that is trained.

    Raises:
        ConfigError: no network can be built for these images.
        CheckpointError: the codec's VAE cannot be loaded.
    """

    adversary = None
    warnings: Sequence[str] = ()

    def __init__(self, config: RunConfig, spec: ImageSpec):
        self.config, self.spec = config, spec
        self.latent_shape = latent_shape(config.codec, spec.channels, spec.height, spec.width)
        self.model: Any = create_model(config.model.variant, **model_arguments(config, spec))
        self.codec = make_codec(config.codec)
        self.summary = config.model.variant
        if self.codec.factor > 1:
            self.summary += " on {}x{}x{} latents".format(*self.latent_shape)
        self.schedule = NoiseSchedule.from_config(config.diffusion)
        self.objective = DiffusionObjective(config.diffusion, self.schedule)
        self.timesteps = make_timestep_sampler(config.diffusion.timestep_sampler, config.diffusion.num_train_timesteps)
        # A sampler that does not work should not be found out at the first preview.
        make_sampler(config.sampling.sampler, self.schedule, config.sampling.num_inference_steps)

    def to(self, device: torch.device) -> None:
        """Move the codec and what timesteps are drawn from to ``device``."""
        self.codec.to(device)
        self.timesteps.to(device)

    def before_training(
        self, config: RunConfig, data: LoadedData, hosts: HostGroup, begins: bool, quiet: bool
    ) -> tuple[LoadedData, list[str]]:
        """Encode the images, if the run caches their latents, and fix the scale of the codec."""
        return prepare_latents(config, self, data, hosts, quiet), []

    def prepare(self, images: Tensor) -> Tensor:
        """The codec's posterior of images (B, C, H, W) in [0, 1]."""
        return self.codec.posterior(images)

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Draws:
        """All random numbers of a step for ``batch_size`` images (the whole batch, whoever computes which part)."""
        t, weights = self.timesteps.sample(batch_size, generator)
        shape = (batch_size, *self.latent_shape)
        noise = torch.randn(shape, generator=generator, device=device)
        drop = torch.rand(batch_size, generator=generator, device=device) < self.config.diffusion.p_uncond
        latent_noise = None
        if self.codec.random and self.config.codec.posterior == "sample":
            latent_noise = torch.randn(shape, generator=generator, device=device)
        return Draws(t, weights, noise, drop, latent_noise)

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: Draws) -> Losses:
        """Weighted losses of a batch.

        Args:
            network: ``self.model``, possibly wrapped.
            inputs: posteriors of the codec; labels: (B,), -1 for none.
        """
        z = self.codec.draw(inputs, draws.latent_noise)
        model_call = self.conditioned(network, labels, draws)
        losses, parts = self.objective.losses(model_call, z, draws.t, draws.noise)
        return Losses(losses * draws.weights, parts)

    def conditioned(
        self, network: Callable[..., Any], labels: Tensor, draws: Draws
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(z, time) -> prediction under the condition that ``labels`` (B,) stand for, dropped where ``draws`` say."""
        if not self.spec.class_names:
            return lambda z, time: network(z, time, class_labels=None).sample
        classes = send(labels, draws.drop.device).masked_fill(draws.drop, NO_CLASS)
        return lambda z, time: network(z, time, class_labels=classes).sample

    def adversary_losses(self, network: Callable[..., Any], inputs: Tensor, outputs: Tensor) -> Tensor:
        raise AssertionError("a denoiser has no adversary")

    def judges(self, draws: Draws) -> bool:
        return False

    def observe(self, draws: Draws, losses: Tensor, left_out: Tensor) -> None:
        """Let the timestep sampler know the losses (B,) at the timesteps drawn."""
        if self.timesteps.learns:
            self.timesteps.update(draws.t, (losses / draws.weights).masked_fill(left_out, torch.nan))

    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        """Loss on held-out images; timesteps spread evenly, the same noise at every call."""
        every = list(batches)
        count = sum(len(labels) for _, labels in every)
        if count == 0:
            return {}
        device = every[0][0].device
        draws = self.draw(0, count, torch.Generator(device).manual_seed(seed), device)
        spread = (torch.arange(count, device=device) + 0.5) / count * self.config.diffusion.num_train_timesteps
        draws = replace(draws, t=spread.long(), weights=torch.ones_like(draws.weights))
        total, start = 0.0, 0
        for inputs, labels in every:
            part = slice(start, start + len(labels))
            total += float(self.losses(self.model, inputs, labels, draws.rows(part)).each.sum())
            start = part.stop
        return {"val_loss": total / count}

    def pipeline(self) -> Any:
        """A pipeline around the network as it is now."""
        scheduler = training_scheduler(self.config.diffusion, clip_sample=self.codec.clip_sample)
        vae = self.codec.vae if isinstance(self.codec, KLVAECodec) else None
        pipeline = GenerationPipeline(self.model, scheduler, vae)
        pipeline.defaults, pipeline.spec = self.config.sampling, self.spec
        pipeline.class_names = self.spec.class_names
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def two_images(self) -> Tensor:
        """Two images (2, C, H, W) drawn in two steps, to see that drawing works."""
        return self.pipeline()(num_images=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images

    def preview(self, seed: int) -> Image:
        """A labelled grid of images drawn from the network as it is now, a row a class."""
        names = self.spec.class_names[:PREVIEW_CLASSES]
        rows = list(range(len(names))) if names else [NO_CLASS] * 4
        columns = PREVIEW_COLUMNS if self.spec.height * self.spec.width <= 32 * 32 else PREVIEW_COLUMNS_LARGE
        labels = [row for row in rows for _ in range(columns)]
        generators = seeded_generators(seed, len(labels))
        images = self.pipeline()(labels, generator=generators).images
        assert isinstance(images, Tensor)
        captions = [self.spec.class_names[k] for k in labels] if names else None
        return image_grid(images, captions, columns=columns)

    def save(self, folder: Path) -> None:
        """Write the network as it is now as a diffusers pipeline folder."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)

    def state_dict(self) -> dict[str, Tensor]:
        """State outside the network that a resumed run needs."""
        return self.timesteps.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.timesteps.load_state_dict(state)


def build(config: RunConfig, data: LoadedData) -> DiffusionRecipe:
    """The recipe of a run on images with classes, or on their latents.

    Raises:
        ConfigError: latents without the VAE that they come from; else as :class:`DiffusionRecipe`.
    """
    if data.latents is not None and config.codec.kind != "kl-vae":
        vae = data.latents.vae_path
        raise ConfigError(f"data.source=latents needs the VAE they come from: set codec.kind=kl-vae codec.path={vae}")
    return DiffusionRecipe(config, data.spec)


def doubts(config: RunConfig, data: LoadedData) -> list[str]:
    """Settings of a denoiser that work but hardly mean what they say."""
    doubts = []
    conditional = data.spec.class_names or data.captions
    if conditional and config.diffusion.p_uncond == 0 and config.sampling.guidance_scale != 1:
        doubts.append("diffusion.p_uncond=0: the unconditional branch is not trained, so guidance will not work")
    if conditional and config.diffusion.p_uncond == 1:
        doubts.append("diffusion.p_uncond=1: the condition is never shown to the network")
    hybrid = config.model.variant in VARIANTS and config.model.variant != "unet"
    if hybrid and config.model.channel_mult is not None and len(config.model.channel_mult) < 2:
        doubts.append(f"model.channel_mult has one level, so {config.model.variant} has no hybrid block: it is a unet")
    return doubts
