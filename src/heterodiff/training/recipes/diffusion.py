"""Recipe ``diffusion``: a denoiser of images, conditioned on their class labels."""

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
from heterodiff.models.defaults import FILM_CHANNEL_MULT, LEAN_NORM_GROUPS, MODEL_CHANNELS, NUM_HEADS, default_levels
from heterodiff.models.unet import check_size
from heterodiff.models.variants import VARIANTS, create_model
from heterodiff.pictures import image_grid
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.tasks import task_of
from heterodiff.training.batches import Stream, derive_seed
from heterodiff.training.latents import prepare_latents
from heterodiff.training.processes import HostGroup
from heterodiff.training.recipes.adapting import ADAPTER, adapted, merged, save_updates, train_part
from heterodiff.training.recipes.base import Draws, Losses, Recipe
from heterodiff.training.recipes.initial import start_from
from heterodiff.training.recipes.preservation import Preserved, drawn_images

HAE_KEYS = (
    "patch_size",
    "num_head_channels",
    "use_scale_shift_norm",
    "attention_resolutions",
    "mid_attention",
    "condition_tokens",
    "resblock_updown",
    "memory_optimization",
    "attention_pattern",
    "sparsity",
)
"""Keys of section ``model`` that only the networks of the HAE family read."""
PREPARED_AT_ONCE = 64
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
    with_text = "text" in task_of(config).sections
    # Beside the latents: the text's prior over the map and, but for joint training, over its features.
    prior_channels = channels + (0 if config.alignment.joint else FEATURE_CHANNELS) if with_text else 0
    common = {
        "condition_dim": config.text.embedding_dim if with_text else None,
        "out_channels": channels * (2 if config.diffusion.learn_variance else 1),
        "model_channels": m.model_channels or MODEL_CHANNELS,
        "layers_per_block": m.layers_per_block,
        "dropout": m.dropout,
        "use_checkpoint": m.gradient_checkpointing,
    }
    if m.variant == "film-unet":
        return common | {
            "latent_channels": channels,
            "latent_size": (height, width),
            "guess_channels": prior_channels,
            "channel_mult": m.channel_mult or FILM_CHANNEL_MULT,
            "num_heads": m.num_heads or NUM_HEADS,
            "norm_groups": m.norm_groups or LEAN_NORM_GROUPS,
        }
    channel_mult, _ = default_levels((height, width), m.patch_size, m.channel_mult)
    factor = m.patch_size * 2 ** (len(channel_mult) - 1) * (spec.height // height)
    check_size(spec.height, spec.width, factor)  # in pixels, as the user gives them
    return common | {
        "sample_size": (height, width),
        "in_channels": channels + prior_channels,
        "num_classes": len(spec.class_names) or None,
        "channel_mult": channel_mult,
        "num_heads": m.num_heads,
        "norm_groups": m.norm_groups,
        **{key: getattr(m, key) for key in HAE_KEYS},
    }


@dataclass
class DiffusionDraws(Draws):
    """Timesteps (B,) and their loss weights, noise (B, c, h, w), and where the condition is dropped (B,)."""

    t: Tensor
    weights: Tensor
    noise: Tensor
    drop: Tensor
    latent_noise: Tensor | None = None  # of the draw from the codec's posterior
    choice: Tensor | None = None  # among an image's captions
    preserved: Tensor | None = None  # row among the images that the base run has drawn

    def twice(self) -> "DiffusionDraws":
        """The draws of two batches that share them."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: torch.cat([value, value]) for name, value in tensors.items()})


def make_objective(config: RunConfig) -> DiffusionObjective:
    """The objective of the denoiser.

    Raises:
        ConfigError: a sampler that does not work with it, which would otherwise stop the run at the first preview.
    """
    schedule = NoiseSchedule.from_config(config.diffusion)
    make_sampler(config.sampling.sampler, schedule, config.sampling.num_inference_steps)
    return DiffusionObjective(config.diffusion, schedule)


class DiffusionRecipe(Recipe):
    """Training of a denoiser.

    Args:
        config: the run.
        spec: of the images.

    Raises:
        ConfigError: no network can be built for these images.
        CheckpointError: the codec's VAE cannot be loaded.
    """

    def __init__(self, config: RunConfig, spec: ImageSpec):
        self.config, self.spec = config, spec
        self.latent_shape = latent_shape(config.codec, spec.channels, spec.height, spec.width)
        self.model = create_model(config.model.variant, **model_arguments(config, spec))
        train_part(self.model, config.model)
        self.preserved: Preserved | None = None
        self.codec = make_codec(config.codec)
        self.summary = config.model.variant
        if self.codec.factor > 1:
            self.summary += " on {}x{}x{} latents".format(*self.latent_shape)
        self.objective = make_objective(config)
        self.timesteps = make_timestep_sampler(config.diffusion.timestep_sampler, config.diffusion.num_train_timesteps)

    def to(self, device: torch.device) -> None:
        self.codec.to(device)
        self.timesteps.to(device)

    def before_training(
        self, config: RunConfig, data: LoadedData, hosts: HostGroup, begins: bool, quiet: bool
    ) -> tuple[LoadedData, list[str]]:
        """Encode the images, if the run caches their latents, fix the codec's scale, and take initial weights over."""
        notes: list[str] = []
        if begins and config.model.init_from is not None:
            notes = start_from(config.model.init_from, self.model, config.diffusion.prediction, data.spec.class_names)
        if config.model.prior_preservation:
            self._preserve(config, data.spec.class_names, hosts)
        return prepare_latents(config, self, data, hosts, quiet), notes

    def _preserve(self, config: RunConfig, names: Sequence[str], hosts: HostGroup) -> None:
        m, seed = config.model, derive_seed(config.training.seed, Stream.PRIOR)
        assert config.output is not None
        assert m.init_from is not None
        images, labels = drawn_images(config.output, m.init_from, m.prior_images, names, seed, hosts)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            parts = [self.codec.posterior(part.to(device)) for part in images.split(PREPARED_AT_ONCE)]
        self.preserved = Preserved(torch.cat(parts), labels.to(device))

    def prepare(self, images: Tensor) -> Tensor:
        """The codec's posterior of images (B, C, H, W) in [0, 1]."""
        return self.codec.posterior(images)

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> DiffusionDraws:
        t, weights = self.timesteps.sample(batch_size, generator)
        shape = (batch_size, *self.latent_shape)
        noise = torch.randn(shape, generator=generator, device=device)
        drop = torch.rand(batch_size, generator=generator, device=device) < self.config.diffusion.p_uncond
        latent_noise = None
        if self.codec.random and self.config.codec.posterior == "sample":
            latent_noise = torch.randn(shape, generator=generator, device=device)
        preserved = None
        if self.preserved is not None:
            count = len(self.preserved.labels)
            preserved = torch.randint(count, (batch_size,), generator=generator, device=device)
        return DiffusionDraws(t, weights, noise, drop, latent_noise, preserved=preserved)

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: DiffusionDraws) -> Losses:
        """Weighted losses of a batch.

        Args:
            network: ``self.model``, possibly wrapped.
            inputs: posteriors of the codec; labels: (B,), -1 for none.
        """
        if draws.preserved is not None:
            return self._preserving_losses(network, inputs, labels, draws)
        z = self.codec.draw(inputs, draws.latent_noise)
        model_call = self.conditioned(network, labels, draws)
        losses, parts = self.objective.losses(model_call, z, draws.t, draws.noise)
        return Losses(losses * draws.weights, parts)

    def _preserving_losses(
        self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: DiffusionDraws
    ) -> Losses:
        """Losses of a batch, and of as many images drawn by the base, with the same noise, in one pass."""
        assert self.preserved is not None
        assert draws.preserved is not None
        inputs = torch.cat([inputs, self.preserved.inputs[draws.preserved]])
        labels = torch.cat([send(labels, inputs.device), self.preserved.labels[draws.preserved]])
        both = self.losses(network, inputs, labels, replace(draws.twice(), preserved=None))
        own, prior = both.each.chunk(2)
        parts = {name: value.chunk(2)[0] for name, value in both.parts.items()}
        return Losses(own + self.config.model.prior_preservation * prior, {**parts, "prior_loss": prior.detach()})

    def conditioned(
        self, network: Callable[..., Any], labels: Tensor, draws: DiffusionDraws
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(z, time) -> prediction, conditioned on ``labels`` (B,) but where ``draws`` drop the condition."""
        if not self.spec.class_names:
            return lambda z, time: network(z, time, class_labels=None).sample
        classes = send(labels, draws.drop.device).masked_fill(draws.drop, NO_CLASS)
        return lambda z, time: network(z, time, class_labels=classes).sample

    def observe(self, draws: DiffusionDraws, losses: Tensor, left_out: Tensor) -> None:
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
        draws = replace(draws, t=spread.long(), weights=torch.ones_like(draws.weights), preserved=None)
        total, start = 0.0, 0
        for inputs, labels in every:
            part = slice(start, start + len(labels))
            total += float(self.losses(self.model, inputs, labels, draws.rows(part)).each.sum())
            start = part.stop
        return {"val_loss": total / count}

    @property
    def learned_weights(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        """Write the pipeline, with low-rank updates added to the weights, and these by themselves."""
        own = self.model
        if not adapted(own):
            super().save(folder)
            return
        self.model = merged(own)
        try:
            super().save(folder)
        finally:
            self.model = own
        assert self.config.model.init_from is not None
        save_updates(own, folder / ADAPTER, self.config.model.init_from)

    def pipeline(self) -> Any:
        scheduler = training_scheduler(self.config.diffusion, clip_sample=self.codec.clip_sample)
        vae = self.codec.vae if isinstance(self.codec, KLVAECodec) else None
        pipeline = GenerationPipeline(self.model, scheduler, vae)
        pipeline.defaults, pipeline.spec = self.config.sampling, self.spec
        pipeline.class_names = self.spec.class_names
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def two_images(self) -> Tensor:
        """Two images (2, C, H, W) drawn in two steps, to check that sampling works."""
        return self.pipeline()(num_images=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images

    def preview(self, seed: int) -> Image:
        """A labelled grid of samples, one row per class."""
        names = self.spec.class_names[:PREVIEW_CLASSES]
        rows = list(range(len(names))) if names else [NO_CLASS] * 4
        columns = PREVIEW_COLUMNS if self.spec.height * self.spec.width <= 32 * 32 else PREVIEW_COLUMNS_LARGE
        labels = [row for row in rows for _ in range(columns)]
        generators = seeded_generators(seed, len(labels))
        images = self.pipeline()(labels, generator=generators).images
        assert isinstance(images, Tensor)
        captions = [self.spec.class_names[k] for k in labels] if names else None
        return image_grid(images, captions, columns=columns)

    def state_dict(self) -> dict[str, Tensor]:
        return self.timesteps.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.timesteps.load_state_dict(state)


def build(config: RunConfig, data: LoadedData) -> DiffusionRecipe:
    """Build the recipe of a run on images with classes, or on their latents.

    Raises:
        ConfigError: latents without the VAE that they come from; else as :class:`DiffusionRecipe`.
    """
    if data.latents is not None and config.codec.kind != "kl-vae":
        vae = data.latents.vae_path
        raise ConfigError(f"data.source=latents needs the VAE they come from: set codec.kind=kl-vae codec.path={vae}")
    return DiffusionRecipe(config, data.spec)


def doubts(config: RunConfig, data: LoadedData) -> list[str]:
    """Notes on valid settings of a denoiser that are hardly meant."""
    doubts = []
    conditional = data.spec.class_names or data.captions
    if conditional and config.diffusion.p_uncond == 0 and config.sampling.guidance_scale != 1:
        doubts.append("diffusion.p_uncond=0: the unconditional branch is not trained, so guidance will not work")
    if conditional and config.diffusion.p_uncond == 1:
        doubts.append("diffusion.p_uncond=1: the condition is never shown to the network")
    row = VARIANTS.get(config.model.variant)
    hybrid = row is not None and (row.pooled or row.hybrid is not None)
    if hybrid and config.model.channel_mult is not None and len(config.model.channel_mult) < 2:
        doubts.append(f"model.channel_mult has one level, so {config.model.variant} has no hybrid block: it is a unet")
    return doubts
